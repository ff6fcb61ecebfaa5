"""How bfloat16 parameters take their values: the bits, and their mean."""

import numpy as np
import pytest
import torch
from scipy import stats

from tilework.optim._optimizer.rounding import compensated, philox, stochastic


def test_philox_is_that_of_random123() -> None:
    """The known answers of the library."""
    ones = 0xFFFFFFFF
    assert philox((0, 0, 0, 0), (0, 0)) == 0x6627E8D5
    assert philox((ones,) * 4, (ones, ones)) == 0x408F276D
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox(counter, (0xA4093822, 0x299F31D0)) == 0xD16CFE09


def test_tensors_are_as_numbers() -> None:
    index = torch.arange(2**32 - 3, 2**32 + 4)
    words = philox((index & 0xFFFFFFFF, index >> 32, torch.tensor(7), 3), (torch.tensor(11), 5))
    expected = [philox((int(i) % 2**32, int(i) // 2**32, 7, 3), (11, 5)) for i in index]
    assert words.tolist() == expected


def test_exact_values_never_change() -> None:
    """All of bfloat16, nan and infinities included."""
    patterns = np.arange(2**16, dtype=np.uint32) << 16
    values = torch.from_numpy(patterns.view(np.float32).copy())
    for step in range(3):
        rounded = stochastic(values, torch.arange(2**16), step, 0, 0)
        torch.testing.assert_close(rounded.float(), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("part", [1 / 16, 1 / 2, 7 / 8])
def test_goes_up_as_often_as_keeps_the_mean(part: float) -> None:
    """A binomial test with a false alarm in a million runs, which plain rounding fails."""
    draws, unit = 4096, 2.0**-7
    values = torch.full((draws,), 1 + part * unit)
    rounded = stochastic(values, torch.arange(draws), 1, 0, 42)
    assert set(rounded.tolist()) == {1.0, 1 + unit}
    ups = int((rounded > 1).sum())
    assert stats.binomtest(ups, draws, part).pvalue > 1e-6
    nearest = int((values.bfloat16() > 1).sum())
    assert stats.binomtest(nearest, draws, part).pvalue < 1e-6


def test_elements_steps_parameters_and_seeds_draw_apart() -> None:
    """No two of these counters share their numbers."""
    values, index = 1 + torch.full((512,), 2.0**-8), torch.arange(512)
    runs = [
        stochastic(values, index + shift, step, position, seed)
        for shift, step, position, seed in (
            (0, 0, 0, 0),
            (1, 0, 0, 0),
            (2**32, 0, 0, 0),
            (0, 1, 0, 0),
            (0, 0, 1, 0),
            (0, 0, 0, 1),
            (0, 0, 0, 2**32),
        )
    ]
    for index_, one in enumerate(runs):
        for other in runs[index_ + 1 :]:
            agree = int((one == other).sum())
            assert stats.binomtest(agree, 512, 0.5).pvalue > 1e-6


def test_compensation_keeps_a_sum() -> None:
    """A thousand additions of what bfloat16 alone would lose."""
    value, lacking = torch.ones(3).bfloat16(), torch.zeros(3).bfloat16()
    for _ in range(1000):
        old = value.float()
        value, rest = compensated(old, old + 1e-3, lacking.float())
        lacking = rest.bfloat16()
    torch.testing.assert_close(
        value.float() + lacking.float(), torch.full((3,), 2.0), rtol=2**-8, atol=0
    )
    assert torch.equal((torch.ones(3).bfloat16() + 1e-3).bfloat16(), torch.ones(3).bfloat16())
