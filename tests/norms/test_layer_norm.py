"""What is particular to layer normalization; ``_row_norm`` has the tests that all norms share."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilework.norms import LayerNorm, layer_norm

import samples
from calls import Call, draw
from helpers import FLOATING
from norms._row_norm.problem import EXACT, IMPLEMENTATIONS


@pytest.mark.parametrize("weight_dtype", FLOATING)
@pytest.mark.parametrize("dtype", FLOATING)
def test_is_the_norm_of_torch(dtype, weight_dtype):
    input = torch.randn(8, 6, 50).to(dtype)
    weight, bias = torch.randn(2, 6, 50).to(weight_dtype)
    if weight_dtype in (dtype, torch.float32) and dtype != torch.float64:
        expected = F.layer_norm(input, (6, 50), weight, bias)
    else:  # torch refuses these
        wide = torch.promote_types(dtype, torch.float32)
        expected = F.layer_norm(input.to(wide), (6, 50), weight.to(wide), bias.to(wide)).to(dtype)
    torch.testing.assert_close(layer_norm(input, (6, 50), weight, bias), expected)
    for arguments in ((), (weight.to(dtype),), (None, bias.to(dtype)), (None, None, 0.1)):
        actual = layer_norm(input, (6, 50), *arguments)
        assert torch.equal(actual, F.layer_norm(input, (6, 50), *arguments))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_feature_gives_the_bias(implementation):
    input, weight, bias = torch.randn(4, 1), torch.randn(1), torch.randn(1)
    output = layer_norm(input, 1, weight, bias, implementation=implementation)
    assert torch.equal(output, bias.expand(4, 1))


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("features", [60, 600])
def test_a_large_mean_costs_no_digits(features, implementation):
    """As it does where the variance is the mean of squares less the square of the mean."""
    deviation = torch.arange(features, dtype=torch.float64) % 4 - 1.5
    output = layer_norm(
        (deviation + 2.0**16).float()[None], features, eps=0.0, implementation=implementation
    )
    expected = deviation / math.sqrt(1.25)
    torch.testing.assert_close(output[0].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("implementation", EXACT)
def test_second_derivative_of_a_constant_row(implementation):
    def norm(input):
        return layer_norm(input, 2, eps=0.25, implementation=implementation)[0]

    hessian = torch.func.hessian(norm)(torch.ones(2, dtype=torch.float64))
    assert torch.equal(hessian, torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_of_a_constant_half_precision_sum(implementation):
    """The saved sum is rounded; deviations from an unrounded mean would be amplified."""
    input = torch.full((1, 8), 1.0, dtype=torch.bfloat16, requires_grad=True)
    residual = torch.full((1, 8), 0.003, dtype=torch.bfloat16)
    output, _ = layer_norm(input, 8, residual=residual, implementation=implementation)
    upstream = torch.randn(1, 8).bfloat16()
    (grad,) = torch.autograd.grad(output, input, upstream)
    deviation = upstream.double() - upstream.double().mean()
    expected = deviation / math.sqrt(1e-5)
    torch.testing.assert_close(grad.double(), expected, rtol=2**-7, atol=0.5)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", [7, (3, 7), [3, 7]])
def test_module_takes_the_place_of_that_of_torch(shape, dtype):
    for affine, bias in ((True, True), (True, False), (False, True)):
        arguments = (shape, 1e-4, affine, bias, "cpu", dtype)
        ours, theirs = (cls(*arguments) for cls in (LayerNorm, nn.LayerNorm))
        assert isinstance(ours, nn.LayerNorm)
        assert repr(ours) == repr(theirs)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)
            assert ours.state_dict()[name].dtype == dtype
        for parameter in theirs.parameters():
            nn.init.normal_(parameter)
        ours.load_state_dict(theirs.state_dict())
        input = torch.randn(2, 3, 7).to(dtype)
        assert torch.equal(ours(input), theirs(input))
        ours.reset_parameters()
        theirs.reset_parameters()
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(ours(input), theirs(input))
    meta = LayerNorm(7, device="meta", dtype=torch.bfloat16)
    assert (meta.bias.device.type, meta.bias.dtype) == ("meta", torch.bfloat16)


def test_module_with_residual():
    module = LayerNorm(7, eps=0.1)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    input, residual = torch.randn(2, 4, 7)
    expected = layer_norm(input, 7, module.weight, module.bias, 0.1, residual=residual)
    torch.testing.assert_close(module(input, residual), expected)
    torch.testing.assert_close(expected[0], module(input + residual))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_module_with_an_implementation(implementation: str) -> None:
    module, input = LayerNorm(7, implementation=implementation), torch.randn(3, 7)
    expected = layer_norm(input, 7, *module.parameters(), implementation=implementation)
    assert torch.equal(module(input), expected)
    assert f"implementation={implementation!r}" in repr(module)
    with pytest.raises(ValueError, match="layer_norm: implementation must be one of"):
        LayerNorm(7, implementation="cuda")
    with pytest.raises(ValueError, match="'triton' cannot be used"):
        LayerNorm(7, implementation="triton")(input.double())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_stream_in_float32_stays_so_under_autocast(implementation: str) -> None:
    """As after a linear layer, whose result is in half precision."""
    stream, branch = torch.randn(5, 7), torch.randn(5, 7).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output, total = LayerNorm(7, implementation=implementation)(branch, stream)
    assert torch.equal(total, branch + stream)
    assert (output.dtype, total.dtype) == (torch.bfloat16, torch.float32)


INPUT, WEIGHT = torch.ones(3, 4), torch.ones(4)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (TypeError, "input must be a floating", (INPUT.long(), 4), {}),
        (TypeError, "input must be a floating", (INPUT.to(torch.complex64), 4), {}),
        (ValueError, "normalized_shape must be an int or a non-empty", (INPUT, ()), {}),
        (ValueError, r"normalized_shape must be .* \(3, 4\), got \(3,\)", (INPUT, 3), {}),
        (ValueError, r"weight must be of shape \(4,\)", (INPUT, 4, torch.ones(3, 4)), {}),
        (TypeError, "weight must be a floating", (INPUT, 4, WEIGHT.long()), {}),
        (ValueError, r"bias must be of shape \(4,\)", (INPUT, 4, None, torch.ones(3)), {}),
        (TypeError, "bias must be a floating", (INPUT, 4, None, WEIGHT.long()), {}),
        (ValueError, "bias must lie on", (INPUT, 4, None, WEIGHT.to("meta")), {}),
        (ValueError, "eps must be .* at least 0", (INPUT, 4, None, None, -1e-6), {}),
        (TypeError, "eps must be a number", (INPUT, 4, None, None, None), {}),
        (ValueError, r"residual must be of shape \(3, 4\)", (INPUT, 4), {"residual": INPUT[:1]}),
        (TypeError, "residual must be a floating", (INPUT, 4), {"residual": INPUT.long()}),
        (ValueError, "implementation must be one of", (INPUT, 4), {"implementation": "cuda"}),
        (ValueError, "'triton' cannot be used", (INPUT.double(), 4), {"implementation": "triton"}),
    ],
)
def test_bad_input(error, match, arguments, options):
    with pytest.raises(error, match=f"layer_norm: .*{match}"):
        layer_norm(*arguments, **options)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "normalized_shape", ((),)),
        (TypeError, "normalized_shape", (4.0,)),
        (ValueError, "eps", (4, -1.0)),
    ],
)
def test_bad_module_options(error, match, arguments):
    with pytest.raises(error, match=f"layer_norm: {match}"):
        LayerNorm(*arguments)


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            layer_norm,
            lambda: {"input": draw(3, 5, 6), "weight": draw(6), "bias": draw(6)},
            differentiable=("input", "weight", "bias"),
            options=({"normalized_shape": 6},),
            sizes={6: 6},
        ),
        Call(
            layer_norm,
            lambda: {
                "input": draw(5, 6),
                "weight": draw(6),
                "bias": draw(6),
                "residual": draw(5, 6),
            },
            differentiable=("input", "weight", "bias", "residual"),
            options=({"normalized_shape": 6},),
            sizes={6: 6},
        ),
    ]
