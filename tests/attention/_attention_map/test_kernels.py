"""The kernels as compilers for GPUs see them, and on a GPU where there is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.attention import (
    attention_column_mass,
    attention_entropy,
    attention_lse,
    block_pooled_attention,
)

import ahead_of_time
from attention._attention_map.problem import check, exact_lse, tensors
from attention.test_attention_column_mass import composed as composed_mass
from attention.test_attention_entropy import composed as composed_entropy
from attention.test_attention_lse import composed as composed_lse
from attention.test_block_pooled_attention import composed as composed_pooled
from helpers import dtype_name

KERNELS = {
    "lse_kernel",
    "entropy_kernel",
    "column_mass_kernel",
    "pool_kernel",
    "query_gradient_kernel",
    "key_gradient_kernel",
}


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return ahead_of_time.compiled(Path(__file__).with_name("launches.py"))


@pytest.mark.untyped
def test_every_kernel_compiles_for_every_architecture(reports: list[dict[str, Any]]) -> None:
    seen = {(report["arch"], report["kernel"]) for report in reports}
    assert seen == {(arch, kernel) for arch in ahead_of_time.SHARED_MEMORY for kernel in KERNELS}
    for report in reports:
        assert report["shared"] <= ahead_of_time.SHARED_MEMORY[report["arch"]], report
        if "float32" in report["launch"]:  # known
            continue
        assert report["spilled"] == 0, report
        assert report["matrix"] > 0, report


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "features"), [(63, 100, 80), (300, 300, 64), (257, 190, 256)]
)
def test_on_a_gpu(
    queries: int, keys: int, features: int, is_causal: bool, dtype: torch.dtype
) -> None:
    leaves = tensors(queries, keys, features, dtype=dtype)
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
    lse = exact_lse(*leaves, is_causal, None)
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "enable_gqa": True,
        "implementation": "triton",
    }

    def twice(function: Any, *args: Any, **more: Any) -> Any:
        def call(query: Tensor, key: Tensor) -> Tensor:
            first, second = (function(query, key, *args, **more, **options) for _ in range(2))
            assert torch.equal(first, second)
            return first

        return call

    cases = [
        (twice(attention_lse), lambda q, k: composed_lse(q, k, is_causal), True),
        (
            twice(attention_entropy, lse),
            lambda q, k: composed_entropy(q, k, is_causal, None),
            True,
        ),
        (
            twice(attention_column_mass, lse, query_window=40),
            lambda q, k: composed_mass(q, k, lse, is_causal, None, 40),
            False,
        ),
    ]
    for block in ((64, 64), (40, 17)):
        for pool in ("max", "sum"):
            cases.append(
                (
                    twice(block_pooled_attention, lse, block_size=block, pool=pool),
                    lambda q, k, b=block, p=pool: composed_pooled(q, k, lse, b, p, is_causal, None),
                    False,
                )
            )
    for function, composed, differentiable in cases:
        check(leaves, function, composed, differentiable)
