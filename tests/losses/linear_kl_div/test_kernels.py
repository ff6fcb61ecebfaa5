"""The kernels as compilers for GPUs see them, their functions, and on a GPU where there is one."""

import mmap
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tilework import _triton
from tilework.losses import linear_kl_div

import ahead_of_time
from helpers import assert_exact, dtype_name
from losses.linear_kl_div.problem import DIVERGENCES, Problem, composed


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return ahead_of_time.compiled(Path(__file__).with_name("launches.py"))


@pytest.mark.untyped
def test_every_kernel_compiles_for_every_architecture(reports: list[dict[str, Any]]) -> None:
    seen = {(report["arch"], report["kernel"]) for report in reports}
    kernels = {"sums_kernel", "mixture_kernel", "backward_kernel"}
    assert seen == {(arch, kernel) for arch in ahead_of_time.SHARED_MEMORY for kernel in kernels}
    for report in reports:
        assert report["spilled"] == 0, report
        assert report["shared"] <= ahead_of_time.SHARED_MEMORY[report["arch"]], report
        if "float32" not in report["launch"]:
            # One loop of products for each head.
            assert report["matrix"] > 1, report


@triton.jit
def _elementary_kernel(input_ptr, expm1_ptr, log1p_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    values = tl.load(input_ptr + places)
    tl.store(expm1_ptr + places, _triton.expm1(values))
    tl.store(log1p_ptr + places, _triton.log1p(values))


@pytest.mark.untyped
def test_elementary_functions() -> None:
    sizes = torch.logspace(-20, 0.3, 512)
    values = torch.cat((sizes, -sizes))
    values[:4] = torch.tensor([0.0, 0.5, -0.5, 80.0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = values.to(device)
    exponentials, logarithms = torch.empty_like(values), torch.empty_like(values)
    _elementary_kernel[(1,)](values, exponentials, logarithms, SIZE=1024)
    exact = values.double()
    torch.testing.assert_close(exponentials.double(), exact.expm1(), rtol=1e-6, atol=0)
    inside = values > -0.9
    torch.testing.assert_close(
        logarithms[inside].double(), exact[inside].log1p(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("implementation", ["tiled", "triton"])
@pytest.mark.parametrize(("tokens", "classes"), [(3, 600), (600, 5)])
def test_addresses_beyond_32_bits(implementation: str, tokens: int, classes: int) -> None:
    def far_apart(rows: int) -> torch.Tensor:
        """Rows 2**22 elements apart, in memory of which only the rows are ever touched."""
        memory = mmap.mmap(-1, 2 * rows << 22)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        values = torch.frombuffer(memory, dtype=torch.bfloat16)
        return values.as_strided((rows, 4), (2**22, 1)).normal_()

    assert max(tokens, classes) * 2**22 > 2**31
    far = Problem(
        far_apart(tokens).requires_grad_(),
        far_apart(classes).requires_grad_(),
        far_apart(tokens),
        far_apart(classes),
        options={"divergence": "jsd"},
    )
    near = Problem(
        *(tensor.detach().contiguous() for tensor in far.tensors[:4] if tensor is not None),
        options=far.options,
    )
    near.student_input.requires_grad_()
    near.student_weight.requires_grad_()
    function = partial(linear_kl_div, implementation=implementation)
    for result, expected in zip(far.solve(function), near.solve(function), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_cuda_graph(divergence: str) -> None:
    problem = Problem.random(64, 32, 500, torch.bfloat16, divergence=divergence).on("cuda")
    function = partial(linear_kl_div, implementation="triton")
    expected = problem.solve(function)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.solve(function)
    graph.replay()
    for result, truth in zip(captured, expected, strict=True):
        assert torch.equal(result, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("every_option", [False, True])
@pytest.mark.parametrize(
    ("tokens", "features", "classes"),
    [(1, 1, 3), (100, 63, 1000), (333, 512, 5000), (1024, 768, 50304), (9000, 64, 5001)],
)
def test_on_a_gpu(
    tokens: int,
    features: int,
    classes: int,
    every_option: bool,
    dtype: torch.dtype,
    divergence: str,
) -> None:
    options: dict[str, Any] = (
        {"student_softcap": 20.0, "teacher_softcap": 30.0, "temperature": 2.0, "beta": 0.3}
        if every_option
        else {}
    )
    problem = Problem.random(
        *(tokens, features, classes, dtype),
        bias=every_option,
        token_weight=every_option,
        mask=0.8 if tokens > 1 else 1,
        divergence=divergence,
        **options,
    )
    problem.student_input.data *= features**-0.5
    problem.teacher_input *= 0.3
    problem = problem.on("cuda")
    function = partial(linear_kl_div, implementation="triton")
    actual, again = problem.solve(function), problem.solve(function)
    composition = problem.to(dtype).solve(composed)
    truth = problem.to(torch.float64).solve(composed)
    for result, second, *others in zip(actual, again, composition, truth, strict=True):
        assert torch.equal(result, second)
        assert_exact(result, *others, dtype)
