"""The convolution with standardized filters, against its formula in loops."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilework.norms import ScaledStdConv2d

from helpers import FLOATING, HALF, assert_exact, dtype_name


def filters(layer: ScaledStdConv2d) -> Tensor:
    """The standardized filters in float64, by loops."""
    rows = []
    for row, gain in zip(
        layer.weight.detach().double().flatten(1).tolist(),
        layer.gain.detach().double().flatten().tolist(),
        strict=True,
    ):
        mean = math.fsum(row) / len(row)
        variance = math.fsum((value - mean) ** 2 for value in row) / len(row)
        scale = gain * layer.gamma / math.sqrt(len(row)) / math.sqrt(variance + layer.eps)
        rows.append([scale * (value - mean) for value in row])
    return torch.tensor(rows, dtype=torch.float64).reshape(layer.weight.shape)


def seen(layer: ScaledStdConv2d) -> Tensor:
    """The filters that the layer convolves with, as its answers to single ones."""
    channels, height, width = layer.weight.shape[1:]
    size = channels * height * width
    ones = torch.eye(size, dtype=layer.weight.dtype).reshape(size, channels, height, width)
    bias = 0 if layer.bias is None else layer.bias.reshape(-1, 1, 1)
    return (layer(ones) - bias).reshape(size, -1).t().reshape(layer.weight.shape)


def a_layer(*args: Any, **options: Any) -> ScaledStdConv2d:
    layer = ScaledStdConv2d(*args, **options)
    nn.init.normal_(layer.gain, 1.0, 0.3)
    with torch.no_grad():
        layer.weight += 0.5
    return layer


CASES: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...] = (
    ((4, 6, 3), {}),
    ((4, 6, (3, 2), 2, 1), {"groups": 2, "gamma": 1.7}),
    ((1, 5, 1), {"bias": False}),
    ((2, 3, 3, 1, "same"), {"padding_mode": "circular", "eps": 0.3}),
    ((2, 3, 3, 1, 1, 2), {"padding_mode": "reflect"}),
    ((2, 3, (1, 3), 1, (0, 1)), {"padding_mode": "replicate"}),
    ((3, 3, 3, 1, "valid", 1, 3), {}),
)


@pytest.mark.parametrize(("args", "options"), CASES)
def test_equals_a_convolution_with_the_formula(args: Any, options: Any) -> None:
    layer = a_layer(*args, **options, dtype=torch.float64)
    input = torch.randn(2, args[0], 7, 6, dtype=torch.float64)
    own = {name: value for name, value in options.items() if name not in ("gamma", "eps")}
    plain = nn.Conv2d(*args, **own, dtype=torch.float64)
    plain.weight = nn.Parameter(filters(layer))
    plain.bias = layer.bias
    torch.testing.assert_close(layer(input), plain(input))
    torch.testing.assert_close(layer(input[0]), plain(input[0]))


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_error(dtype: torch.dtype) -> None:
    """Against a composition that rounds after each operation."""
    layer = a_layer(4, 6, 3, bias=False, gamma=1.3, dtype=dtype)
    low = torch.float32 if dtype == torch.float64 else dtype
    weight, gain = layer.weight.detach().to(low), layer.gain.detach().to(low)
    centered = weight - weight.mean((1, 2, 3), keepdim=True)
    variance = centered.square().mean((1, 2, 3), keepdim=True)
    composed = 1.3 * gain * centered / (36 * (variance + layer.eps)).sqrt()
    found, truth = seen(layer), filters(layer)
    assert_exact(found, composed, truth)
    if dtype in HALF:  # rounded once, but for ties within float32's errors
        assert (found == truth.to(dtype)).double().mean() > 0.98


def test_properties_of_filters() -> None:
    layer = a_layer(3, 5, 3, gamma=1.7, eps=1e-3, dtype=torch.float64)
    found = seen(layer).flatten(1).detach()
    torch.testing.assert_close(found.mean(1), torch.zeros(5).double(), rtol=0, atol=1e-15)
    variance = layer.weight.detach().flatten(1).var(1, correction=0)
    gain = layer.gain.detach().flatten()
    expected = gain**2 * 1.7**2 * variance / (variance + 1e-3)
    torch.testing.assert_close(found.square().sum(1), expected)
    with torch.no_grad():
        layer.weight += torch.arange(5.0).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(seen(layer).flatten(1).detach(), found)


def test_a_constant_filter_is_zero_with_a_finite_gradient() -> None:
    layer = ScaledStdConv2d(2, 3, 3)
    nn.init.ones_(layer.weight)
    layer(torch.randn(1, 2, 4, 4)).sum().backward()
    assert torch.equal(seen(layer), torch.zeros(3, 2, 3, 3))
    assert layer.weight.grad.isfinite().all()


def test_is_a_convolution() -> None:
    torch.manual_seed(5)
    plain = nn.Conv2d(4, 6, 3)
    torch.manual_seed(5)
    layer = ScaledStdConv2d(4, 6, 3, gain_init=0.25, gamma=2.0)
    assert isinstance(layer, nn.Conv2d)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)
    assert {n: t.shape for n, t in layer.state_dict().items()} == {
        "weight": (6, 4, 3, 3),
        "bias": (6,),
        "gain": (6, 1, 1, 1),
    }
    assert (layer.gain == 0.25).all()
    expected = "ScaledStdConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), gamma=2.0, eps=1e-06, "
    assert repr(layer) == expected + "gain_init=0.25)"


def test_an_empty_batch() -> None:
    assert ScaledStdConv2d(2, 3, 3)(torch.zeros(0, 2, 5, 5)).shape == (0, 3, 3, 3)


def test_under_autocast_the_filters_are_rounded_once() -> None:
    layer = a_layer(4, 6, 3, bias=False)
    input = torch.randn(2, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(input)
    expected = F.conv2d(input.bfloat16(), filters(layer).float().bfloat16())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)


@pytest.mark.untyped
def test_transforms() -> None:
    layer = a_layer(2, 3, 2, dtype=torch.float64)
    input = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    names, tensors = zip(*layer.named_parameters(), strict=True)

    def run(*values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, named, (input,)).square().sum()

    values = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), layer(input))
    batched = torch.func.vmap(layer)(input)
    torch.testing.assert_close(batched, layer(input))


@pytest.mark.untyped
def test_bad_input() -> None:
    for name in ("eps", "gamma"):
        for value in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=f"ScaledStdConv2d: {name} must be a finite numbe"):
                ScaledStdConv2d(2, 3, 3, **{name: value})
    with pytest.raises(ValueError, match="ScaledStdConv2d: gain_init must be a finite number"):
        ScaledStdConv2d(2, 3, 3, gain_init=math.inf)
    with pytest.raises(TypeError, match="ScaledStdConv2d: gamma must be a number"):
        ScaledStdConv2d(2, 3, 3, gamma="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
        ScaledStdConv2d(3, 4, 3, groups=2)
    with pytest.raises(TypeError, match="positional"):
        ScaledStdConv2d(2, 3, 3, 1, 0, 1, 1, True, "zeros", None, None, 1.7)  # type: ignore[misc]
