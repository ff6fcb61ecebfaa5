"""An odd number of levels about 0, and the fit of their distance."""

import math
from typing import Any

import pytest
import torch

from tilework.quant import balanced_quantize, balanced_scale_init

import samples
from calls import Call, draw
from helpers import FLOATING
from quant.refusals import WEIGHTS


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            balanced_quantize,
            lambda: {"weight": 3 * draw(4, 3), "scale": draw(4, 1).abs() + 0.5},
            differentiable=("weight", "scale"),
            sizes={1: 1},
            options=({"bits": 2},),
        ),
        Call(balanced_scale_init, lambda: {"weight": draw(4, 3)}, options=({"bits": 2},)),
    ]


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_and_gradients(bits: int) -> None:
    weight, scale = (300 * draw(3, 64)).requires_grad_(), draw(3, 1).abs().add(0.5).requires_grad_()
    found = balanced_quantize(weight, scale, bits=bits)
    most = 2 ** (bits - 1)
    levels = torch.arange(-most, most + 1) * scale.detach().unsqueeze(-1)
    assert levels.shape[-1] == 2**bits + 1
    nearest = (weight.detach().unsqueeze(-1) - levels).abs().argmin(-1, keepdim=True)
    truth = levels.expand(3, 64, -1).gather(-1, nearest).squeeze(-1)
    assert torch.equal(found.detach(), truth)
    upstream = draw(3, 64)
    of_weight, of_scale = torch.autograd.grad(found, (weight, scale), upstream)
    ratio = weight.detach() / scale.detach()
    inside = ratio.abs() <= most
    assert torch.equal(of_weight, upstream * inside)
    local = truth / scale.detach() - ratio * inside
    torch.testing.assert_close(
        of_scale, (upstream * local).sum(1, keepdim=True) / math.sqrt(64 * most)
    )
    (twice,) = torch.autograd.grad(
        balanced_quantize(weight, scale, bits=bits, gradient_scale=2.0), scale, upstream
    )
    torch.testing.assert_close(twice, 2 * (upstream * local).sum(1, keepdim=True))


def fitted(entries: list[float], bits: int, iterations: int) -> float:
    most = 2 ** (bits - 1)
    step = max(map(abs, entries)) / most or 1.0
    for _ in range(iterations):
        whole = [min(max(round(w / step), -most), most) for w in entries]
        if any(whole):
            product = math.fsum(w * q for w, q in zip(entries, whole, strict=True))
            step = product / sum(q * q for q in whole)
    return step


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("axis", ["out", "tensor"])
@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_fit(bits: int, axis: str, iterations: int) -> None:
    weight = draw(5, 31)
    weight[1] = 0
    weight[2, 0] = 40
    found = balanced_scale_init(weight, bits=bits, iterations=iterations, axis=axis)
    rows = weight.tolist() if axis == "out" else [weight.flatten().tolist()]
    assert found.shape == (len(rows), 1)
    truth = [fitted(row, bits, iterations) for row in rows]
    assert found.flatten().tolist() == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_error_never_rises(bits: int) -> None:
    weight = draw(40, 50)
    before = torch.full((40,), math.inf)
    for iterations in range(12):
        scale = balanced_scale_init(weight, bits=bits, iterations=iterations)
        error = (weight - balanced_quantize(weight, scale, bits=bits)).square().sum(1)
        assert (error <= before * (1 + 1e-12)).all()
        before = error
    assert torch.equal(
        balanced_scale_init(weight, bits=bits),
        balanced_scale_init(weight, bits=bits, iterations=10),
    )


@pytest.mark.parametrize("dtype", FLOATING)
def test_dtypes(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 7).to(dtype).requires_grad_()
    scale = balanced_scale_init(weight, bits=2)
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not scale.requires_grad
    assert torch.equal(scale, balanced_scale_init(weight.to(scale.dtype), bits=2))
    assert balanced_quantize(weight, scale, bits=2).dtype == dtype


@pytest.mark.untyped
@pytest.mark.parametrize(("message", "error", "change"), WEIGHTS)
def test_bad_weights(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    with pytest.raises(error, match=rf"^balanced_scale_init: {message}"):
        balanced_scale_init(**change, bits=2)


@pytest.mark.untyped
def test_bad_input() -> None:
    weight = torch.ones(2, 3)
    for change, error, message in (
        ({"bits": 0}, ValueError, "bits must be an int from 1 to 8"),
        ({"bits": 9}, ValueError, "bits must be an int from 1 to 8"),
        ({"bits": 2.0}, TypeError, "bits must be an int"),
        ({"iterations": -1}, ValueError, "iterations must be an int of at least 0"),
        ({"axis": "in"}, ValueError, "axis must be one of 'out', 'tensor'"),
    ):
        with pytest.raises(error, match=rf"^balanced_scale_init: {message}"):
            balanced_scale_init(**({"weight": weight, "bits": 2} | change))
    for change, error, message in (
        ({"bits": 9}, ValueError, "bits must be an int from 1 to 8"),
        ({"bits": True}, TypeError, "bits must be an int"),
        ({"weight": weight.long()}, TypeError, "weight must be a floating-point tensor"),
        ({"scale": 0}, ValueError, "scale must be a finite number above 0"),
        ({"scale": torch.ones(2)}, ValueError, "scale must be broadcastable"),
        ({"gradient_scale": math.inf}, ValueError, "gradient_scale must be a finite number"),
    ):
        with pytest.raises(error, match=rf"^balanced_quantize: {message}"):
            balanced_quantize(**({"weight": weight, "scale": 1.0, "bits": 2} | change))
