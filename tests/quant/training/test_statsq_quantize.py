"""Levels with a scale from statistics, by loops, and where they have gradients."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilework.quant import StatsQuantizer, statsq_quantize

import samples
from calls import Call, draw
from helpers import FLOATING

every_bits = pytest.mark.parametrize("bits", range(1, 9))


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            statsq_quantize,
            lambda: {"input": draw(4, 5)},
            differentiable=("input",),
            options=({"bits": 2}, {"boundary_range": 0.4}),
        )
    ]


def expected(row: list[float], bits: int) -> tuple[list[float], list[float]]:
    """The levels of a row, and its places among them."""
    half = 2 ** (bits - 1)
    scale = 2 * math.fsum(map(abs, row)) / len(row)
    levels = [scale * (2 * k + 1) / (2 * half) for k in range(-half, half)]
    values = [min(levels, key=lambda level: abs(level - w)) if scale else 0.0 for w in row]
    places = [max(-1.0, min(1.0, w / scale)) * half - 0.5 if scale else 0.0 for w in row]
    return values, places


@every_bits
@pytest.mark.parametrize("shape", [(5, 63), (1, 7), (4, 3), (2, 3, 8), (6,)])
def test_values(bits: int, shape: tuple[int, ...]) -> None:
    input = draw(*shape)
    input[(0,) * (len(shape) - 1)] *= 10
    found = statsq_quantize(input, bits=bits)
    for row, ours in zip(
        input.reshape(-1, shape[-1]).tolist(), found.reshape(-1, shape[-1]).tolist(), strict=True
    ):
        values, _ = expected(row, bits)
        assert ours == pytest.approx(values, rel=1e-12)
        assert len(set(ours)) <= 2**bits
        assert 0 not in ours


@pytest.mark.parametrize("dtype", FLOATING)
def test_dtypes(dtype: torch.dtype) -> None:
    input = (60000 * torch.rand(3, 40)).to(dtype)
    found = statsq_quantize(input, bits=3)
    assert found.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(found, statsq_quantize(input.to(wide), bits=3).to(dtype))


def test_one_bit_has_two_levels() -> None:
    input = torch.tensor([[-1.0, 1.0, 1.0, -1.0], [-9.0, 1.0, 1.0, 1.0]])
    found = statsq_quantize(input, bits=1)
    assert found.tolist() == [[-1, 1, 1, -1], [-3, 3, 3, 3]]
    ends = torch.tensor([[100.0, -100.0, 1.0, 1.0]])
    assert set(statsq_quantize(ends, bits=1)[0].tolist()) == {50.5, -50.5}


def test_the_middle_goes_to_the_even_place() -> None:
    single = torch.tensor([[1.0], [-1.0]])  # half of the scale: places n / 2 - 1 / 2 and below 0
    assert statsq_quantize(single, bits=2).tolist() == [[0.5], [-1.5]]
    assert statsq_quantize(single, bits=3).tolist() == [[1.25], [-0.75]]


def test_zeros() -> None:
    input = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    found = statsq_quantize(input, bits=2, boundary_range=0.1)
    assert found[0].tolist() == [0, 0]
    assert (found[1] != 0).all()
    statsq_quantize(input, bits=2).sum().backward()
    assert input.grad is not None
    assert (input.grad == 1).all()


@every_bits
@pytest.mark.parametrize("reach", [0.125, 1.25])
def test_gradients(bits: int, reach: float) -> None:
    input = draw(3, 200).requires_grad_()
    with torch.no_grad():
        input[0, 0] = 30
    upstream = draw(3, 200)
    (plain,) = torch.autograd.grad(statsq_quantize(input, bits=bits), input, upstream)
    assert torch.equal(plain, upstream)
    result = statsq_quantize(input, bits=bits, boundary_range=reach)
    assert torch.equal(result, statsq_quantize(input, bits=bits))
    (masked,) = torch.autograd.grad(result, input, upstream)
    half = 2 ** (bits - 1)
    for row, ups, ours in zip(input.tolist(), upstream.tolist(), masked.tolist(), strict=True):
        _, places = expected(row, bits)
        for place, up, g in zip(places, ups, ours, strict=True):
            near = any(abs(place - (i + 0.5)) <= reach for i in range(-half, half - 1))
            assert g == (up if near else 0)
    assert masked.any()


@given(st.integers(-6, 6), st.integers(1, 8))
def test_powers_of_two_pass(power: int, bits: int) -> None:
    input = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 9)))
    factor = float(Fraction(2) ** power)
    found = statsq_quantize(factor * input, bits=bits)
    assert torch.equal(found, factor * statsq_quantize(input, bits=bits))


def test_module_freezes_in_training_alone() -> None:
    module = StatsQuantizer(2, boundary_range=0.01)
    input = draw(4, 6).requires_grad_()
    assert torch.equal(module(input), statsq_quantize(input, bits=2))
    (frozen,) = torch.autograd.grad(module(input).sum(), input)
    (free,) = torch.autograd.grad(module.eval()(input).sum(), input)
    assert (frozen == 0).sum() > 12
    assert (free == 1).all()
    assert StatsQuantizer().bits == 4
    assert not module.state_dict()


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 0}, ValueError, "bits must be an int from 1 to 8"),
        ({"bits": 9}, ValueError, "bits must be an int from 1 to 8"),
        ({"bits": True}, TypeError, "bits must be an int"),
        ({"bits": 2.0}, TypeError, "bits must be an int"),
        ({"boundary_range": -0.1}, ValueError, "boundary_range must be a finite number of at"),
        ({"boundary_range": math.nan}, ValueError, "boundary_range must be a finite number"),
        ({"boundary_range": "1"}, TypeError, "boundary_range must be a number"),
    ],
)
def test_bad_options(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^statsq_quantize: {message}"):
        statsq_quantize(torch.ones(2, 4), **change)
    with pytest.raises(error, match=rf"^StatsQuantizer: {message}"):
        StatsQuantizer(**change)


@pytest.mark.untyped
def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^statsq_quantize: input must be of at least one dim"):
        statsq_quantize(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"^statsq_quantize: input must be a floating-point"):
        statsq_quantize(torch.ones(2, 2).long())
