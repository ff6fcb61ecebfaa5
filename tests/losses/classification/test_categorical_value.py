"""Values of logits, against loops over bins and points."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.losses import categorical_value

import samples
from calls import Call, draw
from helpers import FLOATING, HALF, assert_exact, dtype_name

RANGE: dict[str, Any] = {"min_value": -2.0, "max_value": 3.0}
each_kind = pytest.mark.parametrize("kind", ["hl_gauss", "two_hot"])


def centers(bins: int, kind: str) -> list[float]:
    if kind == "two_hot":
        return [-2 + 5 * k / (bins - 1) for k in range(bins)]
    edges = [-2 + 5 * k / bins for k in range(bins + 1)]
    return [(edges[k] + edges[k + 1]) / 2 for k in range(bins)]


def definition(input: Tensor, kind: str) -> Tensor:
    values = torch.tensor(centers(input.shape[-1], kind), dtype=input.dtype)
    return (input.softmax(-1) * values).sum(-1)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("shape", [(2,), (1, 7), (63, 100), (2, 3, 5), (0, 4)])
@each_kind
def test_equals_its_definition(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    input = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    before = input.clone()
    leaves = [
        input.to(other, copy=True).requires_grad_()
        for other in (dtype, torch.float32 if dtype == torch.float64 else dtype, torch.float64)
    ]
    actual = categorical_value(leaves[0], **RANGE, kind=kind)
    results = [actual, *(definition(leaf, kind) for leaf in leaves[1:])]
    assert actual.dtype == dtype
    assert_exact(*results, dtype)
    upstream = torch.rand(shape[:-1]) + 0.5
    assert_exact(
        *(
            torch.autograd.grad(result, leaf, upstream.to(result.dtype))[0]
            for result, leaf in zip(results, leaves, strict=True)
        ),
        dtype,
    )
    assert torch.equal(input, before)


@given(st.integers(2, 63), st.floats(-50, 50), st.integers(0, 10**6))
def test_bounds_shifts_and_mirrors(bins: int, shift: float, seed: int) -> None:
    torch.manual_seed(seed)
    input = torch.randn(5, bins, dtype=torch.float64)
    for kind in ("hl_gauss", "two_hot"):
        value = categorical_value(input, **RANGE, kind=kind)
        margin = 2.5 / bins if kind == "hl_gauss" else 0
        assert (value >= -2 + margin - 1e-12).all()
        assert (value <= 3 - margin + 1e-12).all()
        torch.testing.assert_close(categorical_value(input + shift, **RANGE, kind=kind), value)
        mirrored = categorical_value(input.flip(-1), **RANGE, kind=kind)
        torch.testing.assert_close(value + mirrored, torch.ones_like(value))


def test_default_is_bins() -> None:
    sure = torch.tensor([0.0, -torch.inf])
    assert categorical_value(sure, min_value=0.0, max_value=8.0) == 2
    assert categorical_value(sure, min_value=0.0, max_value=8.0, kind="two_hot") == 0


def test_extreme_logits_and_nan() -> None:
    assert categorical_value(torch.tensor([1e4, -1e4]), **RANGE, kind="two_hot") == -2
    assert categorical_value(torch.tensor([torch.nan, 0.0]), **RANGE).isnan()


@pytest.mark.untyped
@each_kind
def test_transforms(kind: str) -> None:
    def value(input: Tensor) -> Tensor:
        return categorical_value(input, **RANGE, kind=kind)

    input = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, input, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(value, input)
    expected = value(input)
    torch.testing.assert_close(torch.func.vmap(value)(input), expected)
    compiled = torch.compile(value, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), expected)
    torch.testing.assert_close(value(input.movedim(0, 1)), expected.movedim(0, 1))
    for dtype in HALF:
        with torch.autocast("cpu", dtype=dtype):
            single = value(input.float())
            half = value(input.to(dtype))
        assert single.dtype == half.dtype == torch.float32
        torch.testing.assert_close(single, expected.float())
        torch.testing.assert_close(half, value(input.to(dtype).float()))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("input must be of shape", ValueError, {"input": torch.zeros(3, 1)}),
        ("input must be a floating-point tensor", TypeError, {"input": torch.zeros(3).int()}),
        ("max_value must be above min_value", ValueError, {"max_value": -3.0}),
        ("min_value must be a finite number", ValueError, {"min_value": -math.inf}),
        ("kind must be one of 'hl_gauss', 'two_hot', got 'c51'", ValueError, {"kind": "c51"}),
    ],
)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"input": torch.zeros(3, 4)}
    with pytest.raises(error, match=f"categorical_value: {message}"):
        categorical_value(**(arguments | RANGE | change))


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            categorical_value,
            lambda: {"input": draw(5, 2, 4)},
            differentiable=("input",),
            options=(
                {"min_value": -1.0, "max_value": 2.0},
                {"min_value": -1.0, "max_value": 2.0, "kind": "two_hot"},
            ),
        ),
    ]
