"""What is particular to RMS normalization; ``_row_norm`` has the tests that all norms share."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tilework.norms import RMSNorm, rms_norm

import samples
from calls import Call, draw
from helpers import FLOATING
from norms._row_norm.problem import IMPLEMENTATIONS, Problem
from norms._row_norm.test_numbers import CASES, check


@pytest.mark.parametrize("weight_dtype", FLOATING)
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_is_the_norm_of_torch(dtype, weight_dtype):
    input = torch.randn(8, 100).to(dtype)
    weight = torch.randn(100).to(weight_dtype)
    actual = rms_norm(input, (100,), weight)
    torch.testing.assert_close(actual, F.rms_norm(input, (100,), weight))
    assert torch.equal(rms_norm(input, 100, eps=1e-5), F.rms_norm(input, (100,), eps=1e-5))


@pytest.mark.parametrize(("implementation", "dtype"), CASES)
def test_mixed_dtypes_do_not_warn(dtype, implementation, recwarn):
    """Torch's kernel does, and is not the fused one then."""
    torch.set_warn_always(True)
    try:
        for other in FLOATING:
            weight = torch.ones(4, dtype=other)
            rms_norm(torch.ones(2, 4).to(dtype), 4, weight, implementation=implementation)
    finally:
        torch.set_warn_always(False)
    assert not recwarn.list


@pytest.mark.parametrize(("implementation", "dtype"), CASES)
def test_default_epsilon_is_that_of_the_computation(dtype, implementation):
    eps = 2.220446e-16 if dtype == torch.float64 else 1.1920929e-07
    input = torch.full((1, 4), math.sqrt(eps)).to(dtype)
    output = rms_norm(input, 4, implementation=implementation)
    expected = torch.full_like(input, math.sqrt(0.5))
    torch.testing.assert_close(output, expected)
    assert torch.equal(RMSNorm(4, dtype=dtype)(input), rms_norm(input, 4, torch.ones(4).to(dtype)))


def test_second_derivative_of_a_zero_row():
    def norm(input):
        return rms_norm(input, 2, eps=0.25)[0]

    hessian = torch.func.hessian(norm)(torch.zeros(2, dtype=torch.float64))
    assert torch.equal(hessian, torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize(("implementation", "dtype"), CASES)
@pytest.mark.parametrize("features", [7, 100])
def test_weights_for_each_head(features, implementation, dtype):
    """Queries as (batch, length, heads, features), and a transposed view of them."""
    shape = (2, 2, 3, features)
    for options in ({}, {"residual": dtype, "offset": 0.5}):
        problem = Problem.random(False, shape, dtype, weight=dtype, heads=True, **options)
        check(problem, implementation)
    problem.input = problem.input.detach().transpose(0, 1).contiguous().transpose(0, 1)
    problem.input.requires_grad_()
    check(problem, implementation)


@pytest.mark.untyped
def test_weights_of_heads_with_several_normalized_dimensions():
    input, weight = torch.randn(2, 5, 3, 4), torch.randn(5, 3, 4)
    expected = F.rms_norm(input, (3, 4)) * weight
    for implementation in IMPLEMENTATIONS:
        actual = rms_norm(input, (3, 4), weight, implementation=implementation)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", [7, (3, 7), [3, 7]])
def test_module_takes_the_place_of_that_of_torch(shape, dtype):
    ours, theirs = (cls(shape, 1e-5, True, "cpu", dtype) for cls in (RMSNorm, nn.RMSNorm))
    assert isinstance(ours, nn.RMSNorm)
    assert repr(ours) == repr(theirs)
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.weight.dtype == dtype
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(2, 3, 7).to(dtype)
    assert torch.equal(ours(input), theirs(input))
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(input), theirs(input))

    assert repr(RMSNorm(shape)) == repr(nn.RMSNorm(shape))
    bare, theirs = RMSNorm(shape, None, False), nn.RMSNorm(shape, None, False)
    assert repr(bare) == repr(theirs)
    assert bare.state_dict() == theirs.state_dict() == {}
    assert torch.equal(bare(input), theirs(input))

    assert repr(RMSNorm(shape)) == repr(nn.RMSNorm(shape))
    bare, theirs = RMSNorm(shape, None, False), nn.RMSNorm(shape, None, False)
    assert repr(bare) == repr(theirs)
    assert bare.state_dict() == theirs.state_dict() == {}
    assert torch.equal(bare(input), theirs(input))


def test_module_with_offset_and_residual():
    module = RMSNorm(7, weight_offset=1.0)
    assert torch.equal(module.weight, torch.zeros(7))
    assert repr(module) == "RMSNorm((7,), eps=None, elementwise_affine=True, weight_offset=1.0)"
    input, residual = torch.randn(2, 4, 7)
    torch.testing.assert_close(module(input), nn.RMSNorm(7)(input))
    nn.init.normal_(module.weight)
    expected = rms_norm(input, 7, 1 + module.weight, residual=residual)
    torch.testing.assert_close(module(input, residual), expected)
    module.reset_parameters()
    assert torch.equal(module.weight, torch.zeros(7))
    meta = RMSNorm(7, device="meta", dtype=torch.bfloat16)
    assert (meta.weight.device.type, meta.weight.dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_module_with_an_implementation(implementation: str) -> None:
    module, input = RMSNorm(7, implementation=implementation), torch.randn(3, 7)
    expected = rms_norm(input, 7, *module.parameters(), implementation=implementation)
    assert torch.equal(module(input), expected)
    assert f"implementation={implementation!r}" in repr(module)
    with pytest.raises(ValueError, match="rms_norm: implementation must be one of"):
        RMSNorm(7, implementation="cuda")
    with pytest.raises(ValueError, match="'triton' cannot be used"):
        RMSNorm(7, implementation="triton")(input.double())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_stream_in_float32_stays_so_under_autocast(implementation: str) -> None:
    """As after a linear layer, whose result is in half precision."""
    stream, branch = torch.randn(5, 7), torch.randn(5, 7).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output, total = RMSNorm(7, implementation=implementation)(branch, stream)
    assert torch.equal(total, branch + stream)
    assert (output.dtype, total.dtype) == (torch.bfloat16, torch.float32)


INPUT, WEIGHT = torch.ones(3, 4), torch.ones(4)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (TypeError, "input must be a floating", (INPUT.long(), 4), {}),
        (TypeError, "input must be a floating", (INPUT.to(torch.complex64), 4), {}),
        (TypeError, "input must be a floating", ([1.0, 2.0], 2), {}),
        (ValueError, "normalized_shape must be an int or a non-empty", (INPUT, ()), {}),
        (ValueError, "normalized_shape must be an int or a non-empty", (INPUT, -1), {}),
        (TypeError, "normalized_shape must be an int or a non-empty", (INPUT, 4.0), {}),
        (TypeError, "normalized_shape must be an int or a non-empty", (INPUT, "4"), {}),
        (TypeError, "normalized_shape must be an int or a non-empty", (INPUT, None), {}),
        (ValueError, r"normalized_shape must be .* \(3, 4\), got \(3,\)", (INPUT, 3), {}),
        (ValueError, "normalized_shape must be the trailing", (INPUT, (2, 3, 4)), {}),
        (ValueError, r"weight must be of shape \(4,\)", (INPUT, 4, torch.ones(1)), {}),
        (ValueError, r"weight must be of shape \(3, 4\)", (INPUT, 4, torch.ones(2, 4)), {}),
        (ValueError, r"weight must be of shape \(4,\)", (INPUT[0], 4, torch.ones(1, 4)), {}),
        (TypeError, "weight must be a floating", (INPUT, 4, WEIGHT.long()), {}),
        (ValueError, "eps must be .* at least 0", (INPUT, 4, WEIGHT, -1e-6), {}),
        (ValueError, "eps must be .* at least 0", (INPUT, 4, WEIGHT, math.nan), {}),
        (TypeError, "eps must be a number", (INPUT, 4, WEIGHT, "small"), {}),
        (ValueError, r"residual must be of shape \(3, 4\)", (INPUT, 4), {"residual": INPUT[:1]}),
        (TypeError, "residual must be a floating", (INPUT, 4), {"residual": INPUT.long()}),
        (ValueError, "residual must lie on", (INPUT, 4), {"residual": INPUT.to("meta")}),
        (ValueError, "weight_offset must be 0 without a weight", (INPUT, 4), {"weight_offset": 1}),
        (TypeError, "weight_offset must be a number", (INPUT, 4), {"weight_offset": None}),
        (ValueError, "implementation must be one of", (INPUT, 4), {"implementation": "cuda"}),
    ],
)
def test_bad_input(error, match, arguments, options):
    with pytest.raises(error, match=f"rms_norm: {match}"):
        rms_norm(*arguments, **options)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("error", "match", "arguments", "options"),
    [
        (ValueError, "normalized_shape", ((),), {}),
        (TypeError, "normalized_shape", (4.0,), {}),
        (ValueError, "eps", (4, -1.0), {}),
        (ValueError, "weight_offset must be 0 without", (4, None, False), {"weight_offset": 1.0}),
    ],
)
def test_bad_module_options(error, match, arguments, options):
    with pytest.raises(error, match=f"rms_norm: {match}"):
        RMSNorm(*arguments, **options)


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            rms_norm,
            lambda: {"input": draw(3, 5, 6), "weight": draw(6)},
            differentiable=("input", "weight"),
            options=({"normalized_shape": 6},),
            sizes={6: 6},
        ),
        Call(
            rms_norm,
            lambda: {"input": draw(5, 6), "weight": draw(6), "residual": draw(5, 6)},
            differentiable=("input", "weight", "residual"),
            options=({"normalized_shape": 6},),
            sizes={6: 6},
        ),
    ]
