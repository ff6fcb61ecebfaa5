"""Calibeating, against a list of the past."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilework.losses import Calibeating, OnlinePlattScaling

STREAMS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), max_size=30)


@given(STREAMS, st.integers(1, 12))
def test_equals_a_list(stream: list[tuple[float, int]], num_bins: int) -> None:
    calibeating = Calibeating(num_bins=num_bins)
    past: list[tuple[int, int]] = []
    for probability, target in stream:
        bin = min(math.floor(probability * num_bins), num_bins - 1)
        seen = [label for where, label in past if where == bin]
        expected = sum(seen) / len(seen) if seen else probability
        assert calibeating.predict(probability) == expected
        calibeating.update(probability, target)
        past.append((bin, target))


def test_ends_of_bins() -> None:
    calibeating = Calibeating(num_bins=4)
    for probability in (0.0, 0.25, 0.5, 0.75, 1.0):
        calibeating.update(probability, True)
    assert calibeating.counts.tolist() == [1, 1, 1, 2]
    assert calibeating.positives.tolist() == [1, 1, 1, 2]


def test_after_online_platt_scaling_it_is_calibrated() -> None:
    """Where the true probability is no sigmoid of the logit, Platt scaling is not enough."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(6000, generator=generator, dtype=torch.float64)
    truth = 0.5 + 0.4 * torch.sin(6 * values)
    outcomes = (torch.rand(6000, generator=generator, dtype=torch.float64) < truth).long()
    platt, calibeating = OnlinePlattScaling(), Calibeating(num_bins=20)
    errors = {"platt": 0.0, "calibeating": 0.0}
    for value, outcome in zip(values.tolist(), outcomes.tolist(), strict=True):
        scaled = platt.predict(value)
        errors["platt"] += (scaled - outcome) ** 2
        errors["calibeating"] += (calibeating.predict(scaled) - outcome) ** 2
        platt.update(value, outcome)
        calibeating.update(scaled, outcome)
    assert errors["calibeating"] < errors["platt"]


def test_resumes() -> None:
    first, second = Calibeating(num_bins=5), Calibeating(num_bins=5)
    first.update(0.62, 1)
    second.load_state_dict(first.state_dict())
    assert second.predict(0.65) == 1
    assert repr(first) == "Calibeating(num_bins=5)"


@pytest.mark.untyped
def test_bad_input() -> None:
    with pytest.raises(ValueError, match="Calibeating: num_bins must be an int of at least 1"):
        Calibeating(num_bins=0)
    with pytest.raises(TypeError, match="Calibeating: num_bins must be an int"):
        Calibeating(num_bins=2.5)  # type: ignore[arg-type]
    calibeating = Calibeating()
    for probability in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"Calibeating\.predict: probability must be a number"):
            calibeating.predict(probability)
        with pytest.raises(ValueError, match=r"Calibeating\.update: probability must be a number"):
            calibeating.update(probability, 1)
    with pytest.raises(TypeError, match=r"Calibeating\.predict: probability must be a number"):
        calibeating.predict("0.5")  # type: ignore[arg-type]
    for target in (2, 0.5, -1):
        with pytest.raises(ValueError, match=r"Calibeating\.update: target must be 0 or 1"):
            calibeating.update(0.5, target)  # type: ignore[arg-type]
    assert not calibeating.counts.any()
