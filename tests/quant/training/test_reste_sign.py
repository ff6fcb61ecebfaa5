"""Signs with the gradient of a root, and layers of them, against loops in float64."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tilework.quant import ReSTEConv2d, ReSTELinear, reste_exponent, reste_sign

import samples
from calls import Call, draw
from helpers import FLOATING


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            reste_sign,
            lambda: {"input": draw(4, 3)},
            differentiable=("input",),
            options=({}, {"exponent": 2.5, "threshold": 1.0, "interval": 0.2}),
        )
    ]


def slope(x: float, exponent: float, threshold: float, interval: float) -> float:
    if abs(x) > threshold:
        return 0.0
    if abs(x) <= interval:
        return interval ** (1 / exponent - 1)
    return abs(x) ** (1 / exponent - 1) / exponent


OPTIONS = [(1.0, 1.5, 0.1), (3.0, 1.5, 0.1), (1.7, 0.5, 0.25), (2.0, 0.75, 0.75)]


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("exponent", "threshold", "interval"), OPTIONS)
def test_signs_and_their_gradients(
    dtype: torch.dtype, exponent: float, threshold: float, interval: float
) -> None:
    # The ends themselves are inside, in the digits of the computation.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ends = torch.tensor([threshold, interval], dtype=wide)
    points = torch.tensor([0.0, -0.0, 1e-6, 0.05, 0.2, 0.3, 0.6, 1.2, 2.0, 1e4], dtype=wide)
    points = torch.cat([points, ends, torch.nextafter(ends, ends + 1)])
    input = torch.cat([points, -points]).to(dtype).requires_grad_()
    upstream = torch.randn(len(input)).to(dtype)
    result = reste_sign(input, exponent=exponent, threshold=threshold, interval=interval)
    assert result.dtype == dtype
    (gradient,) = torch.autograd.grad(result, input, upstream)
    unit = torch.finfo(dtype).eps
    t, m = ends.tolist()
    for x, y, g, up in zip(*(v.tolist() for v in (input, result, gradient, upstream)), strict=True):
        assert y == (1 if x >= 0 else -1)
        assert g == pytest.approx(up * slope(x, exponent, t, m), rel=8 * unit, abs=0)


@given(
    st.floats(-3, 3),
    st.floats(1, 10),
    st.floats(0.01, 1),
    st.floats(1, 3),
)
def test_slopes_are_even_and_bounded(
    x: float, exponent: float, interval: float, threshold: float
) -> None:
    def found(value: float, exponent: float) -> float:
        input = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        options = {"threshold": threshold, "interval": interval}
        (result,) = torch.autograd.grad(reste_sign(input, exponent=exponent, **options), input)
        return result.item()

    here = found(x, exponent)
    assert here == found(-x, exponent)
    assert 0 <= here <= interval ** (1 / exponent - 1) * (1 + 1e-12)
    assert found(x, 1.0) == (1 if abs(x) <= threshold else 0)
    assert found(x, exponent * (1 + 1e-9)) == pytest.approx(here, rel=1e-6)


def test_second_derivatives() -> None:
    input = torch.tensor([-2.0, -0.7, -0.05, 0.0, 0.05, 0.7, 2.0], dtype=torch.float64)
    input.requires_grad_()
    upstream = draw(7).requires_grad_()
    result = reste_sign(input, exponent=2.0)
    (first,) = torch.autograd.grad(result, input, upstream, create_graph=True)
    of_input, of_upstream = torch.autograd.grad(first.sum(), (input, upstream))
    for x, up, a, b in zip(
        *(t.tolist() for t in (input, upstream, of_input, of_upstream)), strict=True
    ):
        inside = 0.1 < abs(x) <= 1.5
        bend = -0.25 * abs(x) ** -1.5 * math.copysign(1, x) if inside else 0
        assert a == pytest.approx(up * bend, rel=1e-12)
        assert b == pytest.approx(slope(x, 2.0, 1.5, 0.1), rel=1e-12)
    _, tangents = torch.func.jvp(
        lambda x: reste_sign(x, exponent=2.0), (input.detach(),), (upstream.detach(),)
    )
    torch.testing.assert_close(tangents, first.detach())


def test_what_is_not_finite() -> None:
    input = torch.tensor([torch.nan, torch.inf, -torch.inf], requires_grad=True)
    result = reste_sign(input, exponent=2.0)
    expected = torch.tensor([torch.nan, 1.0, -1.0])
    torch.testing.assert_close(result.detach(), expected, rtol=0, atol=0, equal_nan=True)
    result.nansum().backward()
    assert input.grad is not None
    assert input.grad.tolist() == [0, 0, 0]


@given(st.integers(1, 300), st.floats(1, 20))
def test_schedule(epochs: int, end: float) -> None:
    values = [reste_exponent(epoch, epochs, end=end) for epoch in range(epochs + 1)]
    assert values[0] == 1
    assert values[-1] == pytest.approx(end, rel=1e-14)
    assert all(low <= high for low, high in pairwise(values))
    for epoch, value in enumerate(values):
        expected = 1 + (1 - math.cos(math.pi / 2 * epoch / epochs)) * (end - 1)
        assert value == pytest.approx(expected, rel=1e-14)
    assert reste_exponent(1, 2) == pytest.approx(3 - math.sqrt(2), rel=1e-15)


def signs(tensor: Tensor) -> Tensor:
    return torch.where(tensor.detach() >= 0, 1.0, -1.0).to(tensor.dtype)


def binary(weight: Tensor) -> Tensor:
    entries = weight.detach().flatten().tolist()
    return signs(weight) * (math.fsum(map(abs, entries)) / len(entries))


def weight_gradient(weight: Tensor, upstream: Tensor, exponent: float) -> Tensor:
    """Of a sum of ``upstream`` times the binary weights, by loops."""
    entries, pulls = weight.detach().flatten().tolist(), upstream.flatten().tolist()
    mean = math.fsum(map(abs, entries)) / len(entries)
    of_mean = math.fsum(g * (1 if w >= 0 else -1) for g, w in zip(pulls, entries, strict=True))
    found = [
        g * mean * slope(w, exponent, 1.5, 0.1) + math.copysign(of_mean, of_mean * w) / len(entries)
        for g, w in zip(pulls, entries, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64).reshape(weight.shape)


LAYERS: list[tuple[type[nn.Module], type[nn.Module], tuple[Any, ...], tuple[int, ...]]] = [
    (ReSTELinear, nn.Linear, (5, 4), (2, 3, 5)),
    (ReSTELinear, nn.Linear, (5, 4, False), (5,)),
    (ReSTEConv2d, nn.Conv2d, (4, 6, 3), (2, 4, 5, 6)),
    (ReSTEConv2d, nn.Conv2d, (4, 6, (3, 2), 2, 1, 1, 2, False), (2, 4, 5, 6)),
    (ReSTEConv2d, nn.Conv2d, (2, 3, 3, 1, "same", 2), (2, 5, 6)),
    (ReSTEConv2d, nn.Conv2d, (2, 3, 3, 1, 1, 1, 1, True, "circular"), (1, 2, 5, 6)),
    (ReSTEConv2d, nn.Conv2d, (2, 3, 3, 1, 1, 1, 1, True, "reflect"), (1, 2, 5, 6)),
    (ReSTEConv2d, nn.Conv2d, (2, 3, 3, 1, 1, 1, 1, True, "replicate"), (1, 2, 5, 6)),
]


@pytest.mark.parametrize(("ours", "torchs", "arguments", "shape"), LAYERS)
@pytest.mark.parametrize("binarize_input", [True, False])
def test_layers(
    ours: Any, torchs: Any, arguments: tuple[Any, ...], shape: tuple[int, ...], binarize_input: bool
) -> None:
    layer = ours(*arguments, dtype=torch.float64, binarize_input=binarize_input)
    plain = torchs(*arguments, dtype=torch.float64)
    assert isinstance(layer, torchs)
    assert layer.exponent == 1.0
    layer.exponent = 2.0
    plain.load_state_dict(layer.state_dict(), strict=True)
    with torch.no_grad():
        plain.weight.copy_(binary(layer.weight))
    input = draw(*shape).requires_grad_()
    given = (signs(input) if binarize_input else input.detach()).requires_grad_()
    found, expected = layer(input), plain(given)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    expected.backward(upstream)
    assert input.grad is not None
    assert given.grad is not None
    factor = torch.ones_like(input)
    if binarize_input:
        slopes = [slope(x, 2.0, 1.5, 0.1) for x in input.detach().flatten().tolist()]
        factor = torch.tensor(slopes, dtype=torch.float64).reshape(shape)
    torch.testing.assert_close(input.grad, given.grad * factor, rtol=1e-12, atol=1e-12)
    of_weight = weight_gradient(layer.weight, plain.weight.grad, 2.0)
    torch.testing.assert_close(layer.weight.grad, of_weight, rtol=1e-11, atol=1e-12)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


def test_options_reach_the_layers() -> None:
    for layer, shape in (
        (ReSTELinear(2, 3, threshold=0.5, interval=0.25, dtype=torch.float64), (4, 2)),
        (ReSTEConv2d(2, 3, 1, threshold=0.5, interval=0.25, dtype=torch.float64), (4, 2, 1, 1)),
    ):
        layer.exponent = 3.0
        input = torch.full(shape, 0.2, dtype=torch.float64, requires_grad=True)
        layer(input).sum().backward()
        expected = binary(layer.weight).sum(0).flatten() * 0.25 ** (1 / 3 - 1)
        assert input.grad is not None
        torch.testing.assert_close(input.grad[0].flatten(), expected)
        assert "binarize_input=True, threshold=0.5, interval=0.25" in repr(layer)
        layer.exponent = 0.5
        with pytest.raises(ValueError, match=r"^reste_sign: exponent must be"):
            layer(input)


def test_layers_start_as_those_of_torch() -> None:
    for ours, torchs, arguments, _ in LAYERS:
        torch.manual_seed(5)
        state = ours(*arguments).state_dict()
        torch.manual_seed(5)
        expected = torchs(*arguments).state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.untyped
def test_compilation() -> None:
    layer, input = ReSTELinear(5, 4), torch.randn(3, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for epoch in range(4):
        layer.exponent = reste_exponent(epoch, 3)
        torch.testing.assert_close(compiled(input), layer(input))
        (ours,) = torch.autograd.grad(compiled(input).sum(), layer.weight)
        (expected,) = torch.autograd.grad(layer(input).sum(), layer.weight)
        torch.testing.assert_close(ours, expected)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"exponent": 0.99}, ValueError, "exponent must be a finite number of at least 1"),
        ({"exponent": math.nan}, ValueError, "exponent must be"),
        ({"exponent": True}, TypeError, "exponent must be a number"),
        ({"threshold": 0.0}, ValueError, "threshold must be a finite number above 0"),
        ({"threshold": math.inf}, ValueError, "threshold must be a finite number above 0"),
        ({"interval": 0.0}, ValueError, "interval must be a number above 0 and at most threshold"),
        ({"interval": 1.6}, ValueError, "interval must be a number above 0 and at most"),
        ({"interval": math.nan}, ValueError, "interval must be a number above 0"),
        ({"interval": "0.1"}, TypeError, "interval must be a number"),
    ],
)
def test_bad_options(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^reste_sign: {message}"):
        reste_sign(torch.ones(2), **change)
    if "exponent" not in change:
        with pytest.raises(error, match=f"^ReSTELinear: {message}"):
            ReSTELinear(2, 2, **change)
        with pytest.raises(error, match=f"^ReSTEConv2d: {message}"):
            ReSTEConv2d(2, 2, 1, **change)


@pytest.mark.untyped
def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"^reste_sign: input must be a floating-point tensor"):
        reste_sign(torch.ones(2).long())
    for arguments, error, message in (
        ((0, 0), ValueError, "epochs must be a finite number above 0"),
        ((-1, 3), ValueError, "epoch must be a number from 0 to epochs=3"),
        ((4, 3), ValueError, "epoch must be a number from 0 to epochs=3"),
        ((math.nan, 3), ValueError, "epoch must be a number from 0"),
        (("1", 3), TypeError, "epoch must be a number"),
    ):
        with pytest.raises(error, match=f"^reste_exponent: {message}"):
            reste_exponent(*arguments)
    with pytest.raises(
        ValueError, match=r"^reste_exponent: end must be a finite number of at least"
    ):
        reste_exponent(1, 3, end=0.5)
