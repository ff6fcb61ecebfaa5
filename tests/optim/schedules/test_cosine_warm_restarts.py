"""Cosine annealing with warm restarts, against torch's scheduler and loops of rational numbers."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LambdaLR

from tilework.optim import cosine_warm_restarts


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)


def by_loops(
    step: Fraction, period: Fraction, multiplier: Fraction, low: float, high: float
) -> float:
    ends = [period]
    while ends[-1] <= step:
        period *= multiplier
        ends.append(ends[-1] + period)
    part = 1 - (ends[-1] - step) / period
    return low + (high - low) * (1 + math.cos(math.pi * part)) / 2


@pytest.mark.parametrize("multiplier", [1, 2, 3])
@pytest.mark.parametrize("period", [1, 5])
def test_equals_torch(period: int, multiplier: int) -> None:
    theirs = CosineAnnealingWarmRestarts(optimizer(), period, multiplier, eta_min=0.2)
    ours = LambdaLR(
        optimizer(),
        lambda step: cosine_warm_restarts(
            step, period=period, multiplier=multiplier, min_factor=0.25
        ),
    )
    for _ in range(60):
        assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr(), rel=1e-12)
        for scheduler in (theirs, ours):
            scheduler.optimizer.step()
            scheduler.step()


def test_equals_torch_at_fractions_of_steps() -> None:
    theirs = CosineAnnealingWarmRestarts(optimizer(), 3, 2)
    for step in np.linspace(0, 40, 83):
        theirs.step(step)
        ours = 0.8 * cosine_warm_restarts(float(step), period=3, multiplier=2)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-12)


# Binary fractions, so that floats are exact, restarts among them.
@given(
    st.integers(0, 2400),
    st.integers(1, 40),
    st.sampled_from([1.0, 1.25, 1.5, 2.0, 2.75]),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_equals_loops(
    eighths: int, period: int, multiplier: float, low: float, high: float
) -> None:
    step = eighths / 8
    actual = cosine_warm_restarts(
        step, period=period / 4, multiplier=multiplier, min_factor=low, max_factor=high
    )
    expected = by_loops(Fraction(step), Fraction(period, 4), Fraction(multiplier), low, high)
    assert actual == pytest.approx(expected, abs=1e-12)
    assert min(low, high) - 1e-15 <= actual <= max(low, high) + 1e-15
    assert low != high or actual == low


@given(st.floats(0.1, 10), st.floats(1, 2), st.floats(0, 1), st.floats(0, 1))
def test_exact_at_restarts(period: float, multiplier: float, low: float, high: float) -> None:
    def factor(step: float) -> float:
        return cosine_warm_restarts(
            step, period=period, multiplier=multiplier, min_factor=low, max_factor=high
        )

    assert factor(0.0) == high
    assert factor(period) == high
    assert factor(period + multiplier * period) == high
    before = factor(period * (1 - 1e-9))
    assert before == pytest.approx(low, abs=1e-12)


def test_numbers() -> None:
    assert isinstance(cosine_warm_restarts(0, period=1), float)
    assert cosine_warm_restarts(7, period=7, multiplier=1.0) == 1.0
    assert cosine_warm_restarts(10**15 + 1, period=2) == pytest.approx(0.5)


@pytest.mark.untyped
def test_scalars_of_numpy() -> None:
    actual = cosine_warm_restarts(np.int64(3), period=np.int64(4), multiplier=np.float64(2))
    assert type(actual) is float
    assert actual == cosine_warm_restarts(3, period=4, multiplier=2)


REFUSES: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("step must be a finite number of at least 0, got -1", ValueError, {"step": -1}),
    ("step must be a finite number of at least 0, got nan", ValueError, {"step": math.nan}),
    ("step must be a number", TypeError, {"step": "1"}),
    ("period must be a finite number above 0, got 0", ValueError, {"period": 0}),
    ("period must be a finite number above 0, got inf", ValueError, {"period": math.inf}),
    ("multiplier must be a finite number of at least 1", ValueError, {"multiplier": 0.99}),
    ("multiplier must be a finite number of at least 1", ValueError, {"multiplier": math.inf}),
    ("min_factor must be a finite number", ValueError, {"min_factor": math.nan}),
    ("max_factor must be a finite number", ValueError, {"max_factor": math.inf}),
]


@pytest.mark.untyped
@pytest.mark.parametrize(("message", "error", "change"), REFUSES, ids=str)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^cosine_warm_restarts: {message}"):
        cosine_warm_restarts(**{"step": 1, "period": 2} | change)
