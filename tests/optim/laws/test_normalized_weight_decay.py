"""Normalized weight decay: its square, times the steps of the run, is that of the argument."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilework.optim import normalized_weight_decay


@given(st.floats(1e-6, 1), st.integers(1, 4096), st.integers(1, 10**7), st.floats(0.5, 1000))
def test_equals_its_definition(decay: float, batch: int, samples: int, epochs: float) -> None:
    actual = normalized_weight_decay(decay, batch_size=batch, num_samples=samples, epochs=epochs)
    steps = Fraction(samples, batch) * Fraction(epochs)
    assert float(Fraction(actual) ** 2 * steps) == pytest.approx(decay**2, rel=1e-14)
    longer = normalized_weight_decay(
        decay, batch_size=batch, num_samples=samples, epochs=4 * epochs
    )
    assert longer == pytest.approx(actual / 2)


def test_zero() -> None:
    assert normalized_weight_decay(0, batch_size=8, num_samples=80, epochs=3) == 0


@pytest.mark.untyped
def test_scalars_of_numpy() -> None:
    actual = normalized_weight_decay(
        np.float32(0.5), batch_size=np.int64(1), num_samples=np.int64(5), epochs=np.int64(20)
    )
    assert type(actual) is float
    assert actual == pytest.approx(0.05)


REFUSES: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("weight_decay must be a finite number of at least 0", ValueError, {"weight_decay": -0.1}),
    ("weight_decay must be a finite number of at least 0", ValueError, {"weight_decay": math.nan}),
    ("batch_size must be a finite number above 0", ValueError, {"batch_size": 0}),
    ("num_samples must be a finite number above 0", ValueError, {"num_samples": -1}),
    ("epochs must be a finite number above 0", ValueError, {"epochs": 0.0}),
    ("epochs must be a number", TypeError, {"epochs": None}),
]


@pytest.mark.untyped
@pytest.mark.parametrize(("message", "error", "change"), REFUSES, ids=str)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments = {"weight_decay": 0.1, "batch_size": 2, "num_samples": 8, "epochs": 3} | change
    with pytest.raises(error, match=f"^normalized_weight_decay: {message}"):
        normalized_weight_decay(**arguments)
