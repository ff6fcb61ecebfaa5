"""The kernels as compilers for GPUs see them, and on a GPU where there is one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tilework.attention import BlockLayout, block_sparse_attention

import ahead_of_time
from attention.block_sparse.test_numbers import active, check, tensors
from helpers import dtype_name


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return ahead_of_time.compiled(Path(__file__).with_name("launches.py"))


@pytest.mark.untyped
def test_every_kernel_compiles_for_every_architecture(reports: list[dict[str, Any]]) -> None:
    seen = {(report["arch"], report["kernel"]) for report in reports}
    kernels = {"forward_kernel", "query_gradient_kernel", "key_gradient_kernel"}
    assert seen == {(arch, kernel) for arch in ahead_of_time.SHARED_MEMORY for kernel in kernels}
    for report in reports:
        assert report["shared"] <= ahead_of_time.SHARED_MEMORY[report["arch"]], report
        # Known: float32 of many features, and the gradient of 256 features on sm_90.
        if "float32" in report["launch"] or "256 features" in report["launch"]:
            continue
        assert report["spilled"] == 0, report
        assert report["matrix"] > 0, report


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "features", "block"),
    [(63, 100, 80, 16), (300, 300, 64, 64), (257, 190, 128, 128), (128, 128, 256, 64)],
)
def test_on_a_gpu(
    queries: int, keys: int, features: int, block: int, is_causal: bool, dtype: torch.dtype
) -> None:
    leaves = tensors(2, 4, 2, queries, keys, features, features, dtype)
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
    mask = active(leaves[0], leaves[1], (block, block), 2, 2)
    check(leaves, mask, (block, block), "triton", is_causal=is_causal)
    layout = BlockLayout.from_dense(mask.cuda(), block)
    first, second = (
        block_sparse_attention(*leaves, layout, is_causal=is_causal, enable_gqa=True)
        for _ in range(2)
    )
    assert torch.equal(first, second)
