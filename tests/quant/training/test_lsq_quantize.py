"""Multiples of a learned step and both gradients, by loops."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tilework.quant import lsq_quantize

import samples
from calls import Call, draw
from helpers import FLOATING


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            lsq_quantize,
            lambda: {"input": 3 * draw(4, 3), "scale": draw(4, 1).abs() + 0.5},
            differentiable=("input", "scale"),
            sizes={1: 1},
            options=(
                {"lower": -4, "upper": 3},
                {"lower": 0, "upper": 2, "gradient_scale": 0.5},
            ),
        )
    ]


def expected(
    input: Tensor, scale: Tensor, upstream: Tensor, lower: int, upper: int, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, gradients of the input, and gradients of the scale, entry by entry."""
    values, of_input = torch.zeros_like(input), torch.zeros_like(input)
    of_scale = torch.zeros_like(scale)
    steps = scale.expand_as(input)
    for place in np.ndindex(*input.shape):
        x, s, g = input[place].item(), steps[place].item(), upstream[place].item()
        u = x / s
        q = min(max(round(u), lower), upper)
        values[place] = s * q
        inside = lower <= u <= upper
        of_input[place] = g if inside else 0
        local = [0] * (input.dim() - scale.dim()) + list(scale.shape)
        own = tuple(i % n for i, n in zip(place, local, strict=True) if n)
        of_scale[own] += g * (q - (u if inside else 0)) * factor
    return values, of_input, of_scale


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 1), (2, 1, 3), (1, 1, 1)])
@pytest.mark.parametrize(("lower", "upper"), [(-4, 3), (0, 7), (-1, 1), (2, 5)])
@pytest.mark.parametrize("gradient_scale", [None, 0.25, 0.0])
def test_values_and_gradients(
    shape: tuple[int, ...], lower: int, upper: int, gradient_scale: float | None
) -> None:
    input = (3 * draw(2, 5, 3)).requires_grad_()
    scale = (torch.rand(shape, dtype=torch.float64) + 0.3).requires_grad_()
    with torch.no_grad():  # at both ends, and beyond
        ends = torch.tensor([lower, upper, lower - 0.25, upper + 0.25], dtype=torch.float64)
        input[0, :4, 0] = scale.expand(2, 5, 3)[0, :4, 0] * ends
    upstream = draw(2, 5, 3)
    found = lsq_quantize(input, scale, lower=lower, upper=upper, gradient_scale=gradient_scale)
    count = 30 / scale.numel()
    factor = 1 / math.sqrt(count * upper) if gradient_scale is None else gradient_scale
    values, of_input, of_scale = expected(
        input.detach(), scale.detach(), upstream, lower, upper, factor
    )
    assert torch.equal(found.detach(), values)
    gradients = torch.autograd.grad(found, (input, scale), upstream)
    assert torch.equal(gradients[0], of_input)
    torch.testing.assert_close(gradients[1], of_scale, rtol=1e-11, atol=1e-12)


def test_a_number_is_a_step_without_a_gradient() -> None:
    input = torch.randn(4, 3, requires_grad=True)
    found = lsq_quantize(input, 0.25, lower=-2, upper=1)
    assert torch.equal(found, lsq_quantize(input, torch.tensor(0.25), lower=-2, upper=1))
    found.sum().backward()
    scale = np.float64(0.25)
    assert torch.equal(found, lsq_quantize(input, scale, lower=-2, upper=1))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("of_scale", [torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype, of_scale: torch.dtype) -> None:
    input = torch.randn(6, 5).to(dtype).requires_grad_()
    scale = torch.rand(6, 1).to(of_scale).add(0.1).requires_grad_()
    found = lsq_quantize(input, scale, lower=-8, upper=7)
    wide = torch.float64 if torch.float64 in (dtype, of_scale) else torch.float32
    inner = lsq_quantize(input.to(wide), scale.to(wide), lower=-8, upper=7)
    assert found.dtype == dtype
    assert torch.equal(found, inner.to(dtype))
    found.sum().backward()
    assert input.grad is not None
    assert scale.grad is not None
    assert (input.grad.dtype, scale.grad.dtype) == (dtype, of_scale)


def test_training_finds_the_step() -> None:
    torch.manual_seed(0)
    target = 0.3 * torch.randint(-4, 4, (200,))
    scale = torch.tensor(0.2, requires_grad=True)
    for _ in range(200):
        loss = (lsq_quantize(target, scale, lower=-4, upper=3) - target).square().sum()
        (gradient,) = torch.autograd.grad(loss, scale)
        scale = (scale - 0.01 * gradient).detach().requires_grad_()
    assert scale.item() == pytest.approx(0.3, rel=1e-3)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scale": 0.0}, ValueError, "scale must be a finite number above 0"),
        ({"scale": -1.0}, ValueError, "scale must be a finite number above 0"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number above 0"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"scale": torch.ones(4)}, ValueError, r"scale must be broadcastable to shape \(2, 3\)"),
        ({"scale": torch.ones(3).long()}, TypeError, "scale must be a floating-point tensor"),
        ({"input": torch.ones(2, 3).long()}, TypeError, "input must be a floating-point tensor"),
        ({"lower": 3}, ValueError, "lower must be below upper=3"),
        ({"lower": -1.0}, TypeError, "lower must be an int"),
        ({"upper": True}, TypeError, "upper must be an int"),
        ({"upper": 0}, ValueError, "upper must be above 0 without gradient_scale"),
        ({"gradient_scale": math.nan}, ValueError, "gradient_scale must be a finite number"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"input": torch.ones(2, 3), "scale": 1.0, "lower": -4, "upper": 3}
    lsq_quantize(**given)
    lsq_quantize(**(given | {"upper": 0, "gradient_scale": 1.0}))
    with pytest.raises(error, match=rf"^lsq_quantize: {message}"):
        lsq_quantize(**(given | change))
