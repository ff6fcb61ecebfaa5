"""The kernels as compilers for GPUs see them, and on a GPU where there is one."""

from pathlib import Path
from typing import Any

import pytest
import torch

import ahead_of_time
from attention.block_sparse_decode.test_numbers import SHAPES, case, check
from helpers import dtype_name


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return ahead_of_time.compiled(Path(__file__).with_name("launches.py"))


@pytest.mark.untyped
def test_every_kernel_compiles_for_every_architecture(reports: list[dict[str, Any]]) -> None:
    seen = {(report["arch"], report["kernel"]) for report in reports}
    kernels = {"split_kernel", "merge_kernel"}
    assert seen == {(arch, kernel) for arch in ahead_of_time.SHARED_MEMORY for kernel in kernels}
    for report in reports:
        assert report["shared"] <= ahead_of_time.SHARED_MEMORY[report["arch"]], report
        # In float32, ptxas may save eight bytes of registers to fit in one program more.
        is_tight = "float32" in report["launch"] and ", 1 tokens" not in report["launch"]
        assert report["spilled"] <= 8 * is_tight, report
        if report["kernel"] == "split_kernel" and "bfloat16" in report["launch"]:
            # Few rows take the instructions of sm_80 also on newer GPUs.
            assert report["matrix"] + report["matrix of sm_80"] > 0, report


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES.values(),
        {
            "features": 128,
            "values": 128,
            "tokens": 3000,
            "block_size": 64,
            "width": 20,
            "heads": 16,
        },
        {"features": 256, "values": 80, "tokens": 1000, "block_size": 32, "width": 9, "batch": 1},
        {"features": 128, "values": 128, "tokens": 2000, "block_size": 64, "width": 9, "length": 5},
    ],
    ids=str,
)
def test_on_a_gpu(shape: dict[str, Any], dtype: torch.dtype) -> None:
    one = case(**shape, dtype=dtype)
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            setattr(one, name, value.cuda())
    first, second = one.solve("triton"), one.solve("triton")
    check(one, first)
    assert torch.equal(first[0], second[0])
    check(one, one.solve_paged("triton", one.block_size))
