"""Every implementation against float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilework.norms import layer_norm, rms_norm
from tilework.norms._row_norm import IMPLEMENTATIONS as TABLE
from tilework.norms._row_norm import operators, tiled
from tilework.norms._row_norm.common import RowNorm

from helpers import FLOATING, HALF, assert_exact, dtype_name
from norms._row_norm.problem import EXACT, IMPLEMENTATIONS, SIZES, Problem

pytestmark = pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
DTYPES = {entry.name: [dtype for dtype in FLOATING if dtype in entry.dtypes] for entry in TABLE}
CASES = [
    pytest.param(implementation, dtype, id=f"{implementation}-{dtype_name(dtype)}")
    for implementation in IMPLEMENTATIONS
    for dtype in DTYPES[implementation]
]


def check(problem: Problem, implementation: str | None) -> None:
    single = torch.float32 if problem.input.dtype == torch.float64 else None
    actual = problem.solve(lambda one: one.run(implementation))
    composition = problem.to(single).solve(Problem.composed)
    truth = problem.truth()
    assert actual.keys() == truth.keys()
    for name, result in actual.items():
        leaf = problem.leaves.get(name.removeprefix("grad "), problem.input)
        assert result.dtype == (problem.sum_dtype if name == "sum" else leaf.dtype), name
        if result.dtype == torch.float64 != problem.input.dtype:
            result = result.float()  # no more exact than the computation
        if problem.residual is not None and problem.sum_dtype in HALF:
            result = result.to(problem.sum_dtype)  # nor than the sum that is saved
        compared = composition[name]
        compared = compared.float() if result.dtype in (torch.float32, torch.float64) else compared
        assert_exact(result, compared, truth[name])


@pytest.mark.parametrize(("implementation", "dtype"), CASES)
def test_one_feature(implementation: str, dtype: torch.dtype, centered: bool) -> None:
    # Nearly all cancels, so that a composition's rounding, often none, is no yardstick.
    problem = Problem.random(centered, (5, 3, 1), dtype, weight=dtype, bias=dtype)
    actual, truth = problem.solve(lambda one: one.run(implementation)), problem.truth()
    for name, result in actual.items():
        torch.testing.assert_close(result, truth[name].to(result.dtype), msg=name)


@pytest.mark.parametrize(("implementation", "dtype"), CASES)
@pytest.mark.parametrize("features", SIZES[1:])
def test_outputs_and_gradients(
    features: int, implementation: str, dtype: torch.dtype, centered: bool
) -> None:
    shape = (3, 3, features)
    check(Problem.random(centered, shape, dtype), implementation)
    check(Problem.random(centered, shape, dtype, weight=dtype, bias=dtype), implementation)
    full = Problem.random(
        centered, shape, dtype, residual=dtype, weight=dtype, bias=dtype, offset=0.75
    )
    check(full, implementation)


@pytest.mark.parametrize(("implementation", "dtype"), CASES)
def test_mixed_dtypes(implementation: str, dtype: torch.dtype, centered: bool) -> None:
    for other in FLOATING:
        problem = Problem.random(
            centered, (4, 2, 9), dtype, residual=other, weight=other, bias=other, offset=0.75
        )
        check(problem, implementation)
    check(Problem.random(centered, (4, 9), dtype, weight=torch.float32), implementation)
    if centered:
        check(Problem.random(centered, (4, 9), dtype, bias=torch.bfloat16), implementation)


@pytest.mark.untyped
@pytest.mark.parametrize("features", [5, 100])
def test_many_rows_for_each_program(features: int, centered: bool) -> None:
    """Programs go on to further tiles, the last of which is not full."""
    problem = Problem.random(centered, (41, features), weight=torch.float32, bias=torch.float32)
    check(problem, "triton")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides(implementation: str, centered: bool) -> None:
    base, other = torch.randn(2, 5, 3, 4, 14)
    weight = torch.randn(7, 2)[:, 0].requires_grad_()
    for change in (
        lambda t: t[..., :7],
        lambda t: t[..., 7:].transpose(1, 2),
        lambda t: t[:, 1:, ::2, :7].permute(2, 0, 1, 3),
        lambda t: t.transpose(0, 3)[:7].transpose(0, 3),
        lambda t: t[:, :, 0, :7],
        lambda t: t[0, 0, 0, ::2],
        lambda t: t[0, 0, :, :7].expand(3, 4, 7),
        lambda t: t.repeat(1, 1, 1, 1).as_strided((2, 2, 2, 2, 7), (100, 51, 27, 9, 1)),
    ):
        input, upstream = change(base).detach().requires_grad_(), change(other)
        problem = Problem(centered, input, weight=weight, upstream=[upstream])
        check(problem, implementation)
        residual = change(other).contiguous().requires_grad_()
        problem = Problem(
            centered, input, residual, weight, upstream=[upstream, upstream.contiguous()]
        )
        check(problem, implementation)


@pytest.mark.untyped
def test_dense_rows_are_not_copied(centered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from tilework.norms._row_norm import triton

    shapes: list[tuple[int, ...]] = []
    contiguous = Tensor.contiguous

    def copying(tensor: Tensor, **options: Any) -> Tensor:
        if not tensor.is_contiguous():
            shapes.append(tuple(tensor.shape))
        return contiguous(tensor, **options)

    monkeypatch.setattr(Tensor, "contiguous", copying)
    heads = torch.randn(2, 5, 3, 24)[..., 8:16]

    def forward(input: Tensor) -> None:
        options = (1, input.shape[-1], 0.0, 0.0, centered)
        triton.forward(RowNorm(input, None, None, None, *options, input.dtype, None, "triton"))

    for strided in (heads, heads.transpose(1, 2), heads.transpose(1, 2)[:, 0]):
        forward(strided)
    assert not shapes
    forward(heads[..., ::2])
    assert shapes == [(2, 5, 3, 4)]


@pytest.mark.parametrize(("implementation", "dtype"), CASES)
def test_extreme_and_irregular_values(
    implementation: str, dtype: torch.dtype, centered: bool
) -> None:
    largest = 65504.0 if dtype == torch.float16 else 1e18
    for features in (3, 99):
        input = torch.ones(3, features)
        input[0, 1::3] = -largest
        input[0, ::3] = largest
        input[1] = 1e4
        input[1, 0] = 2e4
        input[2] *= 1e-4
        input[2, 0] *= -1
        problem = Problem(centered, input.to(dtype), eps=1e-5)
        single = torch.float32 if dtype == torch.float64 else dtype
        (actual,) = problem.run(implementation)
        (composition,) = problem.to(single).composed()
        assert_exact(actual, composition, _output(problem))

        for row, bad in ((0, torch.nan), (1, torch.inf)):
            problem.input[row, 1] = bad
        (actual,) = problem.run(implementation)
        assert actual[0].isnan().all()
        assert actual[1, 1].isnan()
        assert actual[2].isfinite().all()


def _output(problem: Problem) -> Tensor:
    problem.upstream = [torch.zeros_like(problem.input)]
    return problem.truth()["output"]


@pytest.mark.parametrize(("implementation", "dtype"), CASES)
def test_empty_input(implementation: str, dtype: torch.dtype, centered: bool) -> None:
    for shape in ((0, 7), (3, 0, 7), (3, 0), (0,)):
        problem = Problem.random(centered, shape, dtype, residual=dtype, weight=dtype, bias=dtype)
        for name, result in problem.solve(lambda one: one.run(implementation)).items():
            leaf = problem.leaves.get(name.removeprefix("grad "), problem.input)
            assert result.shape == leaf.shape
            assert not result.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_rounds_once(dtype: torch.dtype, implementation: str, centered: bool) -> None:
    """A second rounding, of the statistics, the sum or the gain, would show in every fourth one."""
    for features in (60, 100):
        problem = Problem.random(
            centered, (64, features), dtype, residual=dtype, weight=dtype, bias=dtype, offset=0.3
        )
        truth = problem.truth()
        for name, actual in zip(("output", "sum"), problem.run(implementation), strict=True):
            assert (actual == truth[name].to(dtype)).double().mean() > 0.99, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_output_comes_from_the_unrounded_sum(implementation: str, centered: bool) -> None:
    """Deviation from adding in half precision: here the sum overflows, not its norm."""
    for features in (8, 100):
        input = torch.full((2, features), 60000.0, dtype=torch.float16)
        input[:, ::2] *= -1
        output, total = Problem(centered, input, input, eps=0.0).run(implementation)
        assert torch.equal(output, input.sign())
        assert total.isinf().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("features", [9, 100])
def test_any_subset_of_gradients(features: int, implementation: str, centered: bool) -> None:
    # Some seconds, in the interpreter: up to 15 subsets.
    problem = Problem.random(
        centered,
        (5, features),
        residual=torch.float32,
        weight=torch.float32,
        bias=torch.float32,
    )
    expected = problem.solve(lambda one: one.run(implementation))
    names = list(problem.leaves)
    for chosen in range(1, 2 ** len(names)):
        wanted = [name for bit, name in enumerate(names) if chosen >> bit & 1]
        one = problem.to()
        for name, leaf in one.leaves.items():
            leaf.requires_grad_(name in wanted)
        leaves = [one.leaves[name] for name in wanted]
        outputs = one.run(implementation)
        used = [n for n, output in enumerate(outputs) if output.requires_grad]
        upstream = [one.upstream[n] for n in used]
        grads = torch.autograd.grad([outputs[n] for n in used], leaves, upstream)
        for name, grad in zip(wanted, grads, strict=True):
            torch.testing.assert_close(grad, expected[f"grad {name}"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_gradient_of_a_float32_residual_is_not_rounded(
    implementation: str, dtype: torch.dtype, centered: bool
) -> None:
    problem = Problem.random(centered, (5, 9), dtype, residual=torch.float32)
    results = problem.solve(lambda one: one.run(implementation))
    wide, narrow = results["grad residual"], results["grad input"]
    assert (wide.dtype, narrow.dtype) == (torch.float32, dtype)
    assert torch.equal(wide.to(dtype), narrow)
    assert (wide != narrow).float().mean() > 0.8


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_of_one_of_the_results(implementation: str, centered: bool) -> None:
    problem = Problem.random(centered, (5, 9), torch.bfloat16, residual=torch.float32)
    output, total = problem.run(implementation)
    leaves = list(problem.leaves.values())
    direct = torch.autograd.grad(total, leaves, problem.upstream[1], retain_graph=True)
    assert [grad.dtype for grad in direct] == [torch.bfloat16, torch.float32]
    assert total.dtype == torch.float32
    assert torch.equal(direct[0], problem.upstream[1].bfloat16())
    assert torch.equal(direct[1], problem.upstream[1])
    actual = torch.autograd.grad(output, leaves, problem.upstream[0])
    problem.upstream[1] = torch.zeros_like(total)
    expected = problem.solve(lambda one: one.run(implementation))
    assert torch.equal(actual[1], expected["grad residual"])


@pytest.mark.untyped
def test_the_same_bits_every_time(centered: bool) -> None:
    problem = Problem.random(
        centered, (41, 100), torch.float16, weight=torch.float16, bias=torch.float16
    )
    first, second = (problem.solve(lambda one: one.run("triton")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("implementation", EXACT)
@settings(deadline=None, max_examples=20)
@given(
    features=st.sampled_from(SIZES[1:]),
    seed=st.integers(0, 2**31),
    factor=st.floats(1e-3, 1e3),
    offset=st.floats(-2, 2),
)
def test_properties(
    implementation: str, centered: bool, features: int, seed: int, factor: float, offset: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    input, residual, upstream = torch.randn(
        3, 4, features, dtype=torch.float64, generator=generator
    )
    weight = torch.randn(features, dtype=torch.float64, generator=generator)
    function: Any = layer_norm if centered else rms_norm

    def norm(input: Tensor, *args: Any, **options: Any) -> Any:
        return function(input, features, *args, **options, implementation=implementation)

    assert_close = torch.testing.assert_close
    ones, zeros = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    plain = norm(input, eps=0.0)
    assert_close(plain.square().mean(-1), ones)
    shift = offset if centered else 0.0
    assert_close(norm(factor * input + shift, eps=0.0), plain, rtol=1e-5, atol=1e-8)
    output, total = norm(input, weight, residual=torch.zeros_like(input))
    assert_close(output, norm(input, weight))
    assert torch.equal(total, input)
    assert torch.equal(norm(input, residual=residual)[1], input + residual)

    leaf = input.clone().requires_grad_()
    (grad,) = torch.autograd.grad(norm(leaf, eps=0.0), leaf, upstream)
    size = float(1 + grad.abs().max())
    assert_close((grad * plain).sum(-1), zeros, rtol=0, atol=1e-10 * size)
    if centered:
        assert_close(plain.mean(-1), zeros)
        assert_close(grad.sum(-1), zeros, rtol=0, atol=1e-10 * size)
    else:
        assert_close(norm(input, weight, weight_offset=offset), norm(input, offset + weight))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_epsilon_is_under_the_root(implementation: str, centered: bool) -> None:
    input = torch.tensor([[3.0, -3.0]])
    (output,) = Problem(centered, input, eps=7.0).run(implementation)
    torch.testing.assert_close(output, input / 4)
    assert math.isclose(float(output[0, 0]), 0.75, rel_tol=1e-6)


def test_large_tensors_on_the_cpu_go_by_tiles(
    centered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch has no fused kernel, and where its gradients of weights are poor."""
    monkeypatch.setattr(tiled, "SMALLEST", 100)
    calls = []
    operator = operators.row_norm
    monkeypatch.setattr(operators, "row_norm", lambda given: calls.append(given) or operator(given))
    single, half = torch.float32, torch.float16
    for rows, dtype, options, expected in (
        (9, single, {}, 0),
        (10, single, {}, not centered),
        (9, single, {"residual": single}, 0),
        (10, single, {"residual": single}, 1),
        (10, half, {"residual": half}, 1),
        (9, single, {"weight": single, "bias": single}, 0),
        (9, half, {}, 0),
        (9, half, {"weight": half}, centered),
        (9, half, {"bias": half}, centered),
    ):
        calls.clear()
        check(Problem.random(centered, (rows, 10), dtype, **options), None)  # type: ignore[arg-type]
        assert len(calls) == expected
