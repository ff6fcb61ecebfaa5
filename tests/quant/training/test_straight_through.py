"""Values of one tensor with gradients of another."""

import math

import pytest
import torch
from torch import Tensor

from tilework.quant import fake_quantize, straight_through

import samples
from calls import Call, draw


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            straight_through,
            lambda: {"input": draw(4, 3), "quantized": draw(4, 3), "mask": draw(4, 3)},
            differentiable=("input",),
        ),
        Call(
            fake_quantize,
            lambda: {
                "input": draw(4, 3),
                "scale": draw(3).abs() + 0.1,
                "zero_point": draw(4, 1).round(),
            },
            differentiable=("input",),
            sizes={1: 1},
            options=({"bits": 3}, {"gradient": "straight_through"}),
        ),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_exact(dtype: torch.dtype) -> None:
    input = (1e4 * torch.randn(50)).to(dtype).requires_grad_()
    quantized = torch.randn(50).to(dtype)
    quantized[:2] = torch.tensor([0.0, -0.0])
    for mask in (None, torch.rand(50) < 0.5, torch.rand(50)):
        result = straight_through(input, quantized, mask)
        assert result.dtype == dtype
        assert torch.equal(result, quantized)
        assert torch.equal(result.signbit(), quantized.signbit())


def test_values_are_exact_where_the_input_is_not_finite() -> None:
    input = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], requires_grad=True)
    quantized = torch.tensor([3.0, -3.0, torch.nan, 2.0])
    result = straight_through(input, quantized, torch.tensor([0.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(result, quantized, rtol=0, atol=0, equal_nan=True)
    result.nansum().backward()
    assert input.grad is not None
    assert input.grad.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_gradients_are_those_of_the_input(masked: str | None) -> None:
    input = draw(5, 3).requires_grad_()
    quantized = draw(5, 3).requires_grad_()
    mask = {None: None, "bool": draw(5, 3) > 0, "float": draw(5, 3)}[masked]
    upstream = draw(5, 3)
    factor = torch.ones_like(input) if mask is None else mask.double()

    def function(x: Tensor) -> Tensor:
        return straight_through(x, quantized, mask)

    (gradient,) = torch.autograd.grad(function(input), input, upstream)
    torch.testing.assert_close(gradient, factor * upstream, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(function(input).sum(), quantized)
    _, tangent = torch.func.jvp(function, (input.detach(),), (upstream,))
    torch.testing.assert_close(tangent, factor * upstream, rtol=0, atol=0)
    loss = function(input).pow(3).sum()
    (first,) = torch.autograd.grad(loss, input, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), input)
    torch.testing.assert_close(second, 6 * quantized.detach() * factor.square())


def test_the_result_has_the_dtype_of_the_values() -> None:
    input = torch.randn(3, dtype=torch.bfloat16, requires_grad=True)
    result = straight_through(input, torch.ones(3))
    assert result.dtype == torch.float32
    result.sum().backward()
    assert input.grad is not None
    assert input.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_levels_of_the_grid(bits: int, dtype: torch.dtype) -> None:
    input = (3 * torch.randn(4, 6)).to(dtype).requires_grad_()
    scale = torch.tensor([[0.5], [0.1], [1.0], [2.0]])
    zero_point = torch.tensor([0.0, 1.0, 3.0, 0.5, 2.0, 7.0])
    clipped = fake_quantize(input, scale, zero_point, bits=bits)
    through = fake_quantize(input, scale, zero_point, bits=bits, gradient="straight_through")
    assert clipped.dtype == dtype
    assert torch.equal(clipped, through)
    upstream = torch.randn(4, 6).to(dtype)
    (of_clipped,) = torch.autograd.grad(clipped, input, upstream)
    (of_through,) = torch.autograd.grad(through, input, upstream)
    assert torch.equal(of_through, upstream)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for o in range(4):
        for j in range(6):
            x, s, z = input[o, j].to(wide), scale[o, 0].to(wide), zero_point[j].to(wide)
            code = round((x / s + z).item())
            inside = 0 <= code <= 2**bits - 1
            value = s * (min(max(code, 0), 2**bits - 1) - z)
            assert clipped[o, j] == value.to(dtype)
            assert of_clipped[o, j] == (upstream[o, j] if inside else 0)


def test_no_gradient_goes_to_the_grid() -> None:
    scale, zero_point = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    input = torch.randn(3, requires_grad=True)
    fake_quantize(input, scale, zero_point).sum().backward()
    assert scale.grad is None
    assert zero_point.grad is None


def test_training_finds_weights_on_the_grid() -> None:
    torch.manual_seed(0)
    rows, target = torch.randn(64, 4), torch.tensor([0.5, -1.0, 0.25, 0.75])
    weight = torch.zeros(4, requires_grad=True)
    grid = torch.tensor(0.25), torch.tensor(8.0)

    def loss(weight: Tensor) -> Tensor:
        return (rows @ (fake_quantize(weight, *grid, bits=4) - target)).square().mean()

    first = loss(weight).item()
    for _ in range(60):
        (gradient,) = torch.autograd.grad(loss(weight), weight)
        weight = (weight - 0.1 * gradient).detach().requires_grad_()
    assert math.isclose(loss(weight).item(), 0.0, abs_tol=1e-12)
    assert first > 0.1


@pytest.mark.untyped
def test_bad_input() -> None:
    ones = torch.ones(2, 3)
    for change, error, message in (
        ({"quantized": torch.ones(3)}, ValueError, r"quantized must be of shape \(2, 3\)"),
        ({"quantized": ones.long()}, TypeError, "quantized must be a floating-point tensor"),
        ({"input": ones.long()}, TypeError, "input must be a floating-point tensor"),
        ({"mask": torch.ones(3)}, ValueError, r"mask must be of shape \(2, 3\)"),
    ):
        with pytest.raises(error, match=rf"^straight_through: {message}"):
            straight_through(**({"input": ones, "quantized": ones} | change))
    for change, error, message in (
        ({"scale": torch.ones(2)}, ValueError, r"scale must be broadcastable to shape \(2, 3\)"),
        ({"zero_point": torch.ones(4, 2, 3)}, ValueError, "zero_point must be broadcastable"),
        ({"scale": torch.ones(3).long()}, TypeError, "scale must be a floating-point tensor"),
        ({"bits": 0}, ValueError, "bits must be an int from 1 to 8"),
        ({"bits": True}, TypeError, "bits must be an int"),
        ({"gradient": "none"}, ValueError, "gradient must be one of 'clipped', 'straight"),
    ):
        given = {"input": ones, "scale": torch.ones(3), "zero_point": torch.ones(1)}
        with pytest.raises(error, match=rf"^fake_quantize: {message}"):
            fake_quantize(**(given | change))
