"""Outputs and gradients against float64, by every implementation."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilework import _triton
from tilework.quant import packed_linear, rtn_quantize
from tilework.quant.products.packed_linear import common, triton

from helpers import FLOATING, dtype_name
from quant.products.packed_linear.problem import Problem

KERNELS = pytest.mark.skipif(not _triton.INTERPRETED, reason="kernels are compiled here")
IMPLEMENTATIONS = (
    "reference",
    "tiled",
    pytest.param("triton", marks=[KERNELS, pytest.mark.untyped]),
)
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
SHAPES: dict[str, dict[str, Any]] = {
    "one row": {"rows": (1,), "columns": 70, "outputs": 37, "bits": 4, "group_size": 32},
    "a row per channel": {"rows": (), "columns": 48, "outputs": 5, "bits": 8},
    "few rows": {"rows": (2, 8), "columns": 101, "outputs": 33, "bits": 4, "group_size": 48},
    "many rows": {"rows": (3, 7), "columns": 45, "outputs": 40, "bits": 8, "group_size": 16},
    "small groups": {"rows": (17,), "columns": 30, "outputs": 3, "bits": 4, "group_size": 5},
    "one long group": {"rows": (3,), "columns": 30, "outputs": 3, "bits": 2, "group_size": 64},
    "single bits": {"rows": (3,), "columns": 33, "outputs": 1, "bits": 1, "group_size": 8},
    "one of each": {"rows": (1,), "columns": 1, "outputs": 1, "bits": 4, "bias": False},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@every
@every_shape
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_equals_float64(
    shape: dict[str, Any],
    dtype: torch.dtype,
    implementation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if implementation == "triton" and dtype == torch.float64:
        pytest.skip("it takes no float64")
    monkeypatch.setattr(common, "ELEMENTS", 256)
    Problem.draw(**shape, dtype=dtype).check(implementation)


@given(
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(1, 50)),
    st.sampled_from(["reference", "tiled"]),
)
def test_any_bits_and_groups(
    bits: int, columns: int, outputs: int, group_size: int | None, implementation: str
) -> None:
    Problem.draw((3,), columns, outputs, bits, group_size).check(implementation)


@every
def test_what_algorithms_return(implementation: str) -> None:
    weight, input = torch.randn(6, 40), torch.randn(4, 40)
    for options in ({"scheme": "symmetric"}, {"bits": 8, "group_size": 16}):
        quantized = rtn_quantize(weight, **options)
        output = packed_linear(
            input,
            quantized.packed(),
            quantized.scale,
            quantized.zero_point,
            bits=quantized.bits,
            group_size=quantized.group_size,
            implementation=implementation,
        )
        torch.testing.assert_close(output, input @ quantized.dequantize().mT)


@every
def test_sizes_of_zero(implementation: str) -> None:
    for rows, columns, outputs in (((2, 0), 8, 3), ((2,), 8, 0), ((2,), 0, 3)):
        problem = Problem.draw(rows, columns, outputs, 4)
        grad = torch.ones(*rows, outputs)
        for found, exact in zip(
            problem.solve(implementation, grad),
            problem.composed(torch.float64, grad),
            strict=True,
        ):
            torch.testing.assert_close(found.double(), exact)


@every
def test_any_strides(implementation: str) -> None:
    problem = Problem.draw((5,), 21, 34, 4, 16)
    plain = problem.check(implementation)[0]
    for name in ("input", "packed", "scale", "zero_point"):
        setattr(problem, name, getattr(problem, name).mT.contiguous().mT)
    problem.bias = torch.stack([problem.bias, problem.bias], 1)[:, 0]  # type: ignore[list-item]
    torch.testing.assert_close(problem.check(implementation)[0], plain)
    problem.input = problem.input[:1].expand(5, -1)
    problem.check(implementation)


@every
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows(implementation: str, bad: float) -> None:
    problem = Problem.draw((3,), 21, 5, 4, 16)
    problem.input[1, 20] = bad
    problem.scale[2, 1] = bad
    output, *_ = problem.solve(implementation, torch.ones(3, 5))
    assert not output[1].isfinite().any()
    assert not output[:, 2].isfinite().any()
    assert output[[0, 2]][:, [0, 1, 3, 4]].isfinite().all()


@every
def test_large_codes_and_zero_points_are_exact(implementation: str) -> None:
    """Their difference is small; in half precision, neither is exact."""
    problem = Problem.draw((2,), 16, 3, 8, bias=False, dtype=torch.float16)
    problem.packed.fill_(255)
    problem.zero_point.fill_(254.96875)
    problem.scale.fill_(1.0)
    problem.input.fill_(1.0)
    output, _ = problem.solve(implementation, torch.ones(2, 3, dtype=torch.float16))
    assert torch.equal(output, torch.full_like(output, 0.5))


@KERNELS
@pytest.mark.untyped
@pytest.mark.parametrize("rows", [1, 40])
def test_parts_do_not_depend_on_the_run(rows: int) -> None:
    problem = Problem.draw((rows,), 200, 20, 4, 32)
    grad = torch.ones(rows, 20)
    first, second = (problem.solve("triton", grad) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@KERNELS
@pytest.mark.untyped
@pytest.mark.parametrize("inner", [8, 16, 64])
@pytest.mark.parametrize("group_size", [None, 8, 24, 32, 64])
def test_tiles_of_any_groups(inner: int, group_size: int | None) -> None:
    problem = Problem.draw((3,), 100, 7, 4, group_size)
    table = triton.DECODE
    entry = table.choose("interpreter", torch.float32)._replace(block_inner=inner)
    with table.override(entry), triton.GRADIENT.override(entry):
        problem.check("triton")
