"""The kernels as compilers for GPUs see them, and on a GPU where there is one."""

from pathlib import Path
from typing import Any

import pytest
import torch

import ahead_of_time
from helpers import dtype_name
from quant.products.packed_linear.problem import Problem
from quant.products.packed_linear.test_numbers import SHAPES


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return ahead_of_time.compiled(Path(__file__).with_name("launches.py"))


@pytest.mark.untyped
def test_every_kernel_compiles_for_every_architecture(reports: list[dict[str, Any]]) -> None:
    seen = {(report["arch"], report["kernel"]) for report in reports}
    kernels = {"product_kernel", "sum_kernel", "gradient_kernel"}
    assert seen == {(arch, kernel) for arch in ahead_of_time.SHARED_MEMORY for kernel in kernels}
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["shared"] <= ahead_of_time.SHARED_MEMORY[report["arch"]], report
        if report["kernel"] == "sum_kernel":
            continue
        if "float32" not in report["launch"]:
            assert report["matrix"] > 0, report
        elif report["arch"] != "gfx942":
            # Those of NVIDIA's GPUs would round to TF32.
            assert report["matrix"] + report["matrix of sm_80"] == 0, report


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES.values(),
        *(
            {"rows": (rows,), "columns": 4096, "outputs": 1100, "bits": bits, "group_size": size}
            for rows in (1, 16, 130)
            for bits, size in ((4, 32), (4, 128), (8, None))
        ),
    ],
    ids=str,
)
def test_on_a_gpu(shape: dict[str, Any], dtype: torch.dtype) -> None:
    problem = Problem.draw(**shape, dtype=dtype)
    for name, value in vars(problem).items():
        if isinstance(value, torch.Tensor):
            setattr(problem, name, value.cuda())
    problem.check("triton")
    grad = torch.ones(*problem.input.shape[:-1], len(problem.packed)).to(problem.input)
    first, second = (problem.solve("triton", grad) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
