"""Codes that turn back, counted one by one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilework.quant import OscillationTracker


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=12),
    st.sampled_from([torch.uint8, torch.int64, torch.float32]),
    st.floats(0, 1),
)
def test_counts(steps: list[list[int]], dtype: torch.dtype, momentum: float) -> None:
    tracker = OscillationTracker(momentum=momentum)
    last, way = steps[0], [0, 0, 0]
    total, ema = [0, 0, 0], [0.0, 0.0, 0.0]
    for step, codes in enumerate(steps):
        came = torch.tensor(codes, dtype=dtype)
        found = tracker.update(came)
        came.zero_()  # what the tracker holds is its own
        turned = [False] * 3
        for j in range(3):
            moved = (last[j] > codes[j]) - (last[j] < codes[j])
            turned[j] = way[j] * moved == -1
            total[j] += turned[j]
            if step:
                ema[j] = momentum * turned[j] + (1 - momentum) * ema[j]
            way[j] = moved or way[j]
        last = codes
        assert found.dtype == torch.bool
        assert found.tolist() == turned
        assert tracker.total is not None
        assert tracker.ema is not None
        assert tracker.total.tolist() == total
        assert tracker.ema.tolist() == pytest.approx(ema, rel=1e-5, abs=1e-30)


def test_reset_and_default() -> None:
    tracker = OscillationTracker()
    assert tracker.momentum == 0.01
    assert tracker.ema is None
    for codes in (0, 1, 0):
        tracker.update(torch.tensor([codes]))
    assert tracker.ema is not None
    assert tracker.ema.item() == pytest.approx(0.01)
    tracker.reset()
    assert tracker.total is None
    assert not tracker.update(torch.zeros(2, 2)).any()


@pytest.mark.untyped
def test_bad_input() -> None:
    for momentum, error in ((-0.1, ValueError), (math.nan, ValueError), ("1", TypeError)):
        with pytest.raises(error, match=r"^OscillationTracker: momentum must be"):
            OscillationTracker(momentum=momentum)
    tracker = OscillationTracker()
    tracker.update(torch.tensor([1, 2]))
    tracker.update(torch.tensor([2, 2]))
    with pytest.raises(ValueError, match=r"^OscillationTracker.update: codes must be of shape"):
        tracker.update(torch.tensor([1]))
    for codes in (torch.tensor([True, False]), torch.ones(2).cfloat(), [1, 2]):
        with pytest.raises(TypeError, match=r"^OscillationTracker.update: codes must be an int"):
            tracker.update(codes)
    assert tracker.update(torch.tensor([1, 2])).tolist() == [True, False]
