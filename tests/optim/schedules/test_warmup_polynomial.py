"""Warm-up and polynomial decay, against torch's schedulers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR, LinearLR, PolynomialLR

from tilework.optim import warmup_polynomial


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def rates(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("final", [0.0, 0.3])
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (1, 2), (5, 20)])
def test_equals_torch(warmup: int, total: int, power: float, final: float) -> None:
    """A linear warm-up, then the decay, which ``final`` squeezes."""
    expected = [1.0] * warmup
    if warmup > 1:
        expected = rates(LinearLR(optimizer(), 1 / warmup, total_iters=warmup - 1), warmup)
    decay = PolynomialLR(optimizer(), total - warmup, power)
    expected += [final + (1 - final) * rate for rate in rates(decay, total - warmup + 3)]
    ours = LambdaLR(
        optimizer(),
        lambda step: warmup_polynomial(
            step, warmup_steps=warmup, total_steps=total, power=power, final_factor=final
        ),
    )
    assert rates(ours, total + 3) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(st.integers(0, 50), st.integers(1, 50), st.floats(0.1, 5), st.floats(0, 0.9))
def test_shape(warmup: int, decay: int, power: float, final: float) -> None:
    def factor(step: int) -> float:
        return warmup_polynomial(
            step,
            warmup_steps=warmup,
            total_steps=warmup + decay,
            power=power,
            final_factor=final,
        )

    values = [factor(step) for step in range(warmup + decay + 2)]
    assert all(isinstance(value, float) for value in values)
    assert values[warmup] == 1
    assert warmup == 0 or values[warmup - 1] == 1
    assert values[: warmup + 1] == sorted(values[: warmup + 1])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert values[-2:] == [final, final]
    assert factor(10**9) == final


@pytest.mark.untyped
def test_scalars_of_numpy() -> None:
    actual = warmup_polynomial(np.int64(3), warmup_steps=np.int64(2), total_steps=np.float64(6))
    assert type(actual) is float
    assert actual == 0.75


REFUSES: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("step must be a finite number of at least 0, got -1", ValueError, {"step": -1}),
    ("step must be a number", TypeError, {"step": None}),
    ("warmup_steps must be a finite number of at least 0", ValueError, {"warmup_steps": -1}),
    ("warmup_steps must be a finite number of at least 0", ValueError, {"warmup_steps": math.nan}),
    ("total_steps must be above warmup_steps, 2, got 2", ValueError, {"total_steps": 2}),
    ("total_steps must be a finite number", ValueError, {"total_steps": math.inf}),
    ("power must be a finite number above 0, got 0", ValueError, {"power": 0}),
    ("power must be a finite number above 0, got nan", ValueError, {"power": math.nan}),
    ("final_factor must be a finite number", ValueError, {"final_factor": math.nan}),
]


@pytest.mark.untyped
@pytest.mark.parametrize(("message", "error", "change"), REFUSES, ids=str)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^warmup_polynomial: {message}"):
        warmup_polynomial(**{"step": 1, "warmup_steps": 2, "total_steps": 4} | change)
