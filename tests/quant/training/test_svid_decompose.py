"""Signs with smooth gradients, their decomposition, and the layer of both."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tilework.quant import OneBitLinear, sign_ste, svid_decompose, unpack_codes

import samples
from calls import Call, draw
from helpers import FLOATING
from quant.refusals import WEIGHTS


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(sign_ste, lambda: {"input": draw(4, 3)}, differentiable=("input",)),
        Call(svid_decompose, lambda: {"weight": draw(4, 3)}),
    ]


POINTS = (-300.0, -2.0, -0.3, -1e-8, -0.0, 0.0, 1e-8, 0.3, 2.0, 300.0)


@pytest.mark.parametrize("dtype", FLOATING)
def test_signs_and_their_gradients(dtype: torch.dtype) -> None:
    input = torch.tensor(POINTS).to(dtype).requires_grad_()
    upstream = torch.randn(len(POINTS)).to(dtype)
    result = sign_ste(input)
    assert result.dtype == dtype
    (gradient,) = torch.autograd.grad(result, input, upstream)
    unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * (dtype != torch.float64))
    for x, y, g, up in zip(*(t.tolist() for t in (input, result, gradient, upstream)), strict=True):
        assert y == (1 if x >= 0 else -1)
        # Near its ends 1 - tanh^2 cancels: the error is of the units of 1.
        assert g == pytest.approx(up * (1.001 - math.tanh(x) ** 2), abs=2 * unit * abs(up))


def test_derivatives_of_all_orders() -> None:
    input = draw(7).requires_grad_()
    upstream = draw(7).requires_grad_()
    result = sign_ste(input)
    (first,) = torch.autograd.grad(result, input, upstream, create_graph=True)
    of_input, of_upstream = torch.autograd.grad(first.sum(), (input, upstream))
    for x, up, a, b in zip(
        *(t.tolist() for t in (input, upstream, of_input, of_upstream)), strict=True
    ):
        tanh = math.tanh(x)
        assert a == pytest.approx(-2 * up * tanh * (1 - tanh**2), rel=1e-12)
        assert b == pytest.approx(1.001 - tanh**2, rel=1e-12)
    nested = torch.func.jacfwd(torch.func.jacfwd(lambda x: sign_ste(x).sum()))(input.detach())
    tanh = input.detach().tanh()
    torch.testing.assert_close(nested, torch.diag(-2 * tanh * (1 - tanh.square())))
    values, tangents = torch.func.jvp(sign_ste, (input.detach(),), (upstream.detach(),))
    assert torch.equal(values, result)
    torch.testing.assert_close(tangents, first.detach(), rtol=1e-14, atol=1e-14)


def test_what_is_not_finite() -> None:
    input = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], requires_grad=True)
    result = sign_ste(input)
    expected = torch.tensor([torch.nan, 1.0, -1.0, 1.0])
    torch.testing.assert_close(result.detach(), expected, rtol=0, atol=0, equal_nan=True)
    result.sum().backward()
    assert input.grad is not None
    assert input.grad[0].isnan()
    assert input.grad[1:3].tolist() == pytest.approx([0.001, 0.001])
    _, tangents = torch.func.jvp(sign_ste, (input.detach(),), (torch.ones(4),))
    assert tangents[1:3].tolist() == pytest.approx([0.001, 0.001])


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 6), (6, 1), (1, 1), (63, 100)])
@pytest.mark.parametrize("dtype", FLOATING)
def test_decomposition_is_the_best(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    weight[0, 0] = 0
    before = weight.clone()
    sign, scale, factor = svid_decompose(weight.requires_grad_())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (sign.dtype, scale.dtype, factor.dtype) == (wide, wide, wide)
    assert (sign.shape, scale.shape, factor.shape) == (shape, shape[:1], shape[1:])
    assert not any(tensor.requires_grad for tensor in (sign, scale, factor))
    assert torch.equal(weight, before)
    assert torch.equal(sign, torch.where(weight < 0, -1.0, 1.0).to(wide))
    assert (scale >= 0).all()
    assert (factor >= 0).all()
    # The error is that of the other singular values; the factors share the norm of the product.
    size = weight.detach().double().abs().numpy()
    singular = np.linalg.svd(size, compute_uv=False)
    error = np.square(size - np.outer(scale.double(), factor.double())).sum()
    unit = float(torch.finfo(wide).eps)
    rest = np.square(singular[1:]).sum()
    assert error == pytest.approx(rest, abs=16 * unit * np.square(singular).sum())
    for part in (scale, factor):
        norm = np.square(part.double().numpy()).sum()
        assert norm == pytest.approx(singular[0], rel=16 * unit)


def test_decomposition_of_what_is_one_product_is_exact() -> None:
    scale, factor = draw(6).abs(), draw(9).abs()
    sign = draw(6, 9).sign()
    weight = sign * torch.outer(scale, factor)
    found = svid_decompose(weight)
    assert torch.equal(found[0], sign)
    torch.testing.assert_close(found[0] * torch.outer(*found[1:]), weight, rtol=1e-13, atol=1e-13)


def test_decomposition_where_singular_values_are_equal() -> None:
    torch.manual_seed(0)
    for weight in (torch.eye(4), torch.block_diag(torch.ones(2, 2), -torch.ones(2, 2))):
        _, scale, factor = svid_decompose(weight.double())
        largest = torch.linalg.matrix_norm(weight.double().abs(), 2)
        reached = scale @ weight.double().abs() @ factor
        torch.testing.assert_close(reached, largest**2)
    sign, scale, factor = svid_decompose(torch.zeros(2, 3))
    assert (sign == 1).all()
    assert not scale.any()
    assert not factor.any()


def output(layer: OneBitLinear, row: list[float]) -> list[float]:
    """By loops."""
    weight, scale, factor = (
        t.tolist() for t in (layer.weight, layer.weight_scale, layer.input_factor)
    )
    mapped = [
        a
        * math.fsum(
            x * b * (1 if w >= 0 else -1) for x, b, w in zip(row, factor, line, strict=True)
        )
        for a, line in zip(scale, weight, strict=True)
    ]
    mean = math.fsum(mapped) / len(mapped)
    variance = math.fsum((y - mean) ** 2 for y in mapped) / len(mapped)
    bias = [0.0] * len(mapped) if layer.bias is None else layer.bias.tolist()
    return [(y - mean) / math.sqrt(variance + 1e-5) + b for y, b in zip(mapped, bias, strict=True)]


@pytest.mark.parametrize("bias", [False, True])
def test_layer(bias: bool) -> None:
    layer = OneBitLinear(5, 7, bias, dtype=torch.float64)
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == [
        "weight",
        *(["bias"] if bias else []),
        "weight_scale",
        "input_factor",
    ]
    assert (layer.weight_scale == 1).all()
    assert (layer.input_factor == 1).all()
    with torch.no_grad():
        layer.weight_scale.copy_(draw(7))
        layer.input_factor.copy_(draw(5))
        layer.weight[0, 0] = 0
    input = draw(2, 3, 5)
    found = layer(input)
    assert found.shape == (2, 3, 7)
    for row, ours in zip(input.reshape(6, 5), found.reshape(6, 7), strict=True):
        assert ours.tolist() == pytest.approx(output(layer, row.tolist()), rel=1e-11, abs=1e-11)
    found.square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_gradient_of_the_weight_is_that_of_the_signs() -> None:
    layer = OneBitLinear(3, 4, dtype=torch.float64)
    input, upstream = draw(5, 3), draw(5, 4)
    layer(input).backward(upstream)
    signs = torch.where(layer.weight.detach() >= 0, 1.0, -1.0).double().requires_grad_()
    mapped = input @ signs.T
    centred = mapped - mapped.mean(1, keepdim=True)
    (centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()).backward(upstream)
    assert signs.grad is not None
    slope = 1.001 - layer.weight.detach().tanh().square()
    torch.testing.assert_close(layer.weight.grad, signs.grad * slope, rtol=1e-10, atol=1e-12)


def test_it_starts_as_that_of_torch() -> None:
    torch.manual_seed(3)
    ours = OneBitLinear(5, 7, True)
    torch.manual_seed(3)
    theirs = nn.Linear(5, 7)
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.bias is not None
    assert torch.equal(ours.bias, theirs.bias)
    assert OneBitLinear(5, 7).bias is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_from_linear(bias: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(9, 4, bias=bias, dtype=dtype).eval()
    with torch.no_grad():
        linear.weight[1, 2] = 0
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    layer = OneBitLinear.from_linear(linear)
    assert type(layer) is OneBitLinear
    assert not layer.training
    assert {tensor.dtype for tensor in layer.parameters()} == {dtype}
    sign, scale, factor = svid_decompose(linear.weight)
    assert torch.equal(layer.weight, (0.01 * sign).to(dtype))
    assert torch.equal(layer.weight_scale, scale.to(dtype))
    assert torch.equal(layer.input_factor, factor.to(dtype))
    assert (layer.bias is not None) == bias
    if layer.bias is not None:
        assert torch.equal(layer.bias, linear.bias)
        assert layer.bias is not linear.bias
    assert all(torch.equal(before[name], tensor) for name, tensor in linear.state_dict().items())
    packed = layer.packed_sign()
    assert packed.shape == (4, 2)
    negative = unpack_codes(packed, 1, 9)
    assert torch.equal(negative, (linear.weight < 0).to(torch.uint8))


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    rows = torch.randn(64, 8)
    target = normalized_signs(rows)
    layer = OneBitLinear(8, 4)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = (layer(rows) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def normalized_signs(rows: Tensor) -> Tensor:
    return nn.functional.layer_norm(rows @ torch.randn(8, 4).sign(), (4,))


@pytest.mark.untyped
def test_autocast_and_compilation() -> None:
    layer, input = OneBitLinear(6, 5, True), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(input).dtype == torch.float32
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), layer(input))


@pytest.mark.untyped
@pytest.mark.parametrize(("message", "error", "change"), WEIGHTS)
def test_bad_weights(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^svid_decompose: {message}"):
        svid_decompose(**change)


@pytest.mark.untyped
def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"^sign_ste: input must be a floating-point tensor"):
        sign_ste(torch.ones(3).long())
    with pytest.raises(TypeError, match=r"^OneBitLinear.from_linear: linear must be an nn.Linear"):
        OneBitLinear.from_linear(nn.Conv2d(1, 1, 1))
    linear = nn.Linear(2, 2)
    nn.init.constant_(linear.weight, torch.inf)
    with pytest.raises(
        ValueError, match=r"^OneBitLinear.from_linear: linear.weight must be finite"
    ):
        OneBitLinear.from_linear(linear)
