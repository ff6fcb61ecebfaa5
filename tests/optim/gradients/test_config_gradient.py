"""Conflict-free gradients, against NumPy's pseudo-inverse, closed forms and loops."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.optim import MomentumConFIG, config_gradient

import samples
from calls import Call, draw
from helpers import FLOATING, HALF, dtype_name

LENGTHS = ("projection", "min", "max", "mean", "harmonic", "geometric")


def definition(grads: Tensor, weights: Tensor | None = None, length: str = "projection") -> Tensor:
    """In float64, by NumPy."""
    rows = grads.detach().double().numpy()
    w = np.ones(len(rows)) if weights is None else weights.double().numpy()
    norms = [math.sqrt(math.fsum(value**2 for value in row)) for row in rows]
    units = np.array([row / n if n else row for row, n in zip(rows, norms, strict=True)])
    rcond = max(rows.shape) * np.finfo(np.float64).eps
    u = np.linalg.pinv(units, rcond=rcond) @ w
    size = np.linalg.norm(u)
    u = u / size if size else u
    if length == "projection":
        factor = sum(row @ u for row in rows)
    else:
        average = {
            "min": min(norms),
            "max": max(norms),
            "mean": sum(norms) / len(norms),
            "harmonic": 0.0 if 0 in norms else len(norms) / sum(1 / n for n in norms),
            "geometric": math.prod(norms) ** (1 / len(norms)),
        }[length]
        factor = average * sum(row @ u for row in units)
    return torch.from_numpy(factor * u)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 5), (3, 40), (4, 4), (5, 2)])
def test_equals_the_pseudo_inverse(shape: tuple[int, int], length: str) -> None:
    grads = torch.randn(shape, dtype=torch.float64) * torch.logspace(-2, 1, shape[0])[:, None]
    weights = torch.rand(shape[0], dtype=torch.float64) + 0.1
    before = grads.clone()
    for given_weights in (None, weights):
        actual = config_gradient(grads, weights=given_weights, length=length)
        torch.testing.assert_close(actual, definition(grads, given_weights, length))
    assert torch.equal(grads, before)
    listed = config_gradient(list(grads), weights=weights, length=length)
    torch.testing.assert_close(listed, definition(grads, weights, length))


@pytest.mark.parametrize("length", LENGTHS)
def test_without_full_rank(length: str) -> None:
    first, second = torch.randn(2, 6, dtype=torch.float64)
    for rows in (
        [first, first],
        [first, 3 * first, second],
        [first, torch.zeros(6).double(), second],
        [torch.zeros(6).double()] * 2,
        [first, second, first + second],
    ):
        grads = torch.stack(rows)
        torch.testing.assert_close(
            config_gradient(rows, length=length), definition(grads, None, length)
        )
    opposite = config_gradient([first, -first], length=length)
    torch.testing.assert_close(opposite, torch.zeros(6).double(), rtol=0, atol=1e-12)
    assert config_gradient(torch.zeros(2, 0), length=length).shape == (0,)


@given(st.integers(1, 5), st.integers(5, 12), st.integers(0, 2**32), st.sampled_from(LENGTHS))
def test_properties(m: int, size: int, seed: int, length: str) -> None:
    torch.manual_seed(seed)
    grads = torch.randn(m, size, dtype=torch.float64)
    result = config_gradient(grads, length=length)
    cosines = torch.nn.functional.cosine_similarity(grads, result[None])
    assert (cosines > 0).all()
    torch.testing.assert_close(cosines, cosines[:1].expand(m))
    order = torch.randperm(m)
    torch.testing.assert_close(config_gradient(grads[order], length=length), result)
    scaled = grads.clone()
    scaled[0] *= 7.0
    other = config_gradient(scaled, length=length)
    torch.testing.assert_close(other / other.norm(), result / result.norm())
    shares = torch.rand(m, dtype=torch.float64) + 0.1
    weighted = config_gradient(grads, weights=shares, length=length)
    cosines = torch.nn.functional.cosine_similarity(grads, weighted[None])
    torch.testing.assert_close(cosines / cosines.sum(), shares / shares.sum())


def test_one_and_identical_and_two() -> None:
    first, second = torch.randn(2, 9, dtype=torch.float64)
    torch.testing.assert_close(config_gradient([first]), first)
    torch.testing.assert_close(config_gradient([first] * 3), 3 * first)
    one, two = first / first.norm(), second / second.norm()
    apart = one - (one @ two) * two, two - (one @ two) * one
    direction = sum(part / part.norm() for part in apart)
    direction = direction / direction.norm()
    expected = ((first + second) @ direction) * direction
    torch.testing.assert_close(config_gradient([first, second]), expected)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    grads = torch.randn(8, 6).to(dtype).t()[::2]
    actual = config_gradient(grads, weights=torch.tensor([1.0, 2.0, 0.5]))
    assert actual.dtype == dtype
    truth = definition(grads, torch.tensor([1.0, 2.0, 0.5]))
    rtol, atol = (torch.finfo(dtype).eps, 1e-5) if dtype in HALF else (1e-5, 1e-6)
    torch.testing.assert_close(actual.double(), truth, rtol=rtol, atol=atol)
    with torch.autocast("cpu", torch.bfloat16):
        again = config_gradient(grads, weights=torch.tensor([1.0, 2.0, 0.5]))
    assert torch.equal(again, actual)
    torch.testing.assert_close(
        config_gradient(torch.ones(2, 3).to(dtype)), torch.full((3,), 2.0).to(dtype)
    )


def test_what_is_not_finite_shows() -> None:
    grads = torch.randn(2, 3)
    for bad in (torch.nan, torch.inf):
        wrong = grads.clone()
        wrong[1, 0] = bad
        assert config_gradient(wrong).isnan().all()
        assert config_gradient(grads, weights=torch.tensor([1.0, bad])).isnan().all()


@pytest.mark.untyped
def test_transforms() -> None:
    grads = torch.randn(4, 3, 8, dtype=torch.float64)
    compiled = torch.compile(config_gradient, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in ("projection", "harmonic"):
        expected = torch.stack([config_gradient(one, length=length) for one in grads])
        torch.testing.assert_close(compiled(grads[0], length=length), expected[0])
        batched = torch.func.vmap(lambda one, length=length: config_gradient(one, length=length))
        torch.testing.assert_close(batched(grads), expected)


class ByLoops:
    """The momentum version, one number at a time."""

    def __init__(self, m: int, size: int, beta1: float, beta2: float, eps: float) -> None:
        self.beta1, self.beta2, self.eps, self.t = beta1, beta2, eps, 0
        self.counts = [0] * m
        self.means = [[0.0] * size for _ in range(m)]
        self.previous = [0.0] * size
        self.squares = [0.0] * size

    def update(self, index: int, grad: Tensor) -> list[float]:
        self.counts[index] += 1
        for place, value in enumerate(grad.tolist()):
            old = self.means[index][place]
            self.means[index][place] = self.beta1 * old + (1 - self.beta1) * value
        if min(self.counts) == 0:
            return [0.0] * len(grad)
        self.t += 1
        unbiased = [
            [value / (1 - self.beta1**count) for value in mean]
            for mean, count in zip(self.means, self.counts, strict=True)
        ]
        combined = definition(torch.tensor(unbiased, dtype=torch.float64)).tolist()
        result = []
        for place, r in enumerate(combined):
            f = r * (1 - self.beta1**self.t)
            pseudo = (f - self.beta1 * self.previous[place]) / (1 - self.beta1)
            self.previous[place] = f
            square = self.beta2 * self.squares[place] + (1 - self.beta2) * pseudo**2
            self.squares[place] = square
            result.append(r / (math.sqrt(square / (1 - self.beta2**self.t)) + self.eps))
        return result


ORDER = (0, 0, 2, 1, 2, 0, 1, 1, 2, 0)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.6, 0.0)])
def test_momentum_equals_loops(betas: tuple[float, float]) -> None:
    momentum = MomentumConFIG(3, betas=betas, eps=1e-3)
    loops = ByLoops(3, 4, *betas, 1e-3)
    for step, index in enumerate(ORDER):
        grad = torch.randn(4, dtype=torch.float64)
        before = grad.clone()
        actual, expected = momentum.update(index, grad), loops.update(index, grad)
        assert torch.equal(grad, before)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))
        assert (actual == 0).all() == (step < 3)


def test_the_state_continues_a_run() -> None:
    grads = torch.randn(len(ORDER), 5)
    whole = MomentumConFIG(3)
    expected = [whole.update(index, grad) for index, grad in zip(ORDER, grads, strict=True)]
    for stop in (0, 2, 6):
        first = MomentumConFIG(3)
        for index, grad in zip(ORDER[:stop], grads[:stop], strict=True):
            first.update(index, grad)
        state = first.state_dict()
        saved = copy.deepcopy(state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        second = MomentumConFIG(3)
        second.load_state_dict(torch.load(file, weights_only=True))
        for one in (first, second):
            for place in range(stop, len(ORDER)):
                assert torch.equal(one.update(ORDER[place], grads[place]), expected[place])
        for left, right in zip(state["exp_avgs"], saved["exp_avgs"], strict=True):
            assert torch.equal(left, right)
        assert state["counts"] == saved["counts"]


def test_momentum_in_half_precision() -> None:
    momentum, precise = MomentumConFIG(2), MomentumConFIG(2)
    for step in range(6):
        grad = torch.randn(5, requires_grad=True).bfloat16()
        actual = momentum.update(step % 2, grad)
        assert actual.dtype == torch.bfloat16
        assert not actual.requires_grad
        expected = precise.update(step % 2, grad.detach().double())
        torch.testing.assert_close(actual.double(), expected, rtol=0.01, atol=1e-6)


@pytest.mark.untyped
def test_bad_input() -> None:
    grads = torch.ones(2, 3)
    bad: tuple[object, ...] = (
        torch.ones(3),
        torch.ones(0, 3),
        torch.ones(1, 2, 3),
        [],
        [torch.ones(2), torch.ones(3)],
        [torch.ones(1, 2)],
    )
    for value in bad:
        with pytest.raises(ValueError, match="config_gradient: grads must be of shape"):
            config_gradient(value)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="config_gradient: length must be one of 'projection', 'mi"
    ):
        config_gradient(grads, length="sum")
    with pytest.raises(ValueError, match=r"config_gradient: weights must be of shape \(2,\)"):
        config_gradient(grads, weights=torch.ones(3))
    with pytest.raises(TypeError, match="config_gradient: weights must be a floating-point tensor"):
        config_gradient(grads, weights=[1.0, 1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config_gradient: grads must be a floating-point tensor"):
        config_gradient(grads.int())
    with pytest.raises(TypeError, match=r"config_gradient: grads\[1\] must be a floating-point"):
        config_gradient([torch.ones(2), 1.0])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="config_gradient: grads must be a tensor or a sequence"):
        config_gradient(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config_gradient: weights must lie on the device of"):
        config_gradient(grads, weights=torch.ones(2, device="meta"))


@pytest.mark.untyped
def test_bad_momentum() -> None:
    with pytest.raises(ValueError, match="MomentumConFIG: num_losses must be an int of at least 1"):
        MomentumConFIG(0)
    for betas in ((1.0, 0.9), (0.9, -0.1), (math.nan, 0.9)):
        with pytest.raises(ValueError, match=r"MomentumConFIG: betas\[.\] must be a number from 0"):
            MomentumConFIG(2, betas=betas)
    with pytest.raises(ValueError, match="MomentumConFIG: betas must be two numbers"):
        MomentumConFIG(2, betas=(0.9,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MomentumConFIG: eps must be a finite number of at least"):
        MomentumConFIG(2, eps=-1e-8)
    momentum = MomentumConFIG(np.int64(2))
    for index in (-1, 2):
        with pytest.raises(ValueError, match="MomentumConFIG: index must be from 0 to 1"):
            momentum.update(index, torch.ones(3))
    with pytest.raises(TypeError, match="MomentumConFIG: index must be an int"):
        momentum.update(0.0, torch.ones(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"MomentumConFIG: grad must be of shape \(P\)"):
        momentum.update(0, torch.ones(3, 1))
    with pytest.raises(TypeError, match="MomentumConFIG: grad must be a floating-point tensor"):
        momentum.update(0, torch.ones(3).int())
    momentum.update(0, torch.ones(3))
    with pytest.raises(ValueError, match=r"MomentumConFIG: grad must be of shape \(3,\)"):
        momentum.update(1, torch.ones(4))
    with pytest.raises(ValueError, match="MomentumConFIG: state_dict must be that of 3 losses"):
        MomentumConFIG(3).load_state_dict(momentum.state_dict())


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            config_gradient,
            lambda: {"grads": draw(3, 5), "weights": draw(3).abs() + 0.1},
            options=({}, {"length": "geometric"}),
        ),
        Call(config_gradient, lambda: {"grads": [draw(5), draw(5)]}),
    ]
