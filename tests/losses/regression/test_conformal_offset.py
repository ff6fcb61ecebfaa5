"""The conformal offset, against counting covered points."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilework.losses import conformal_offset

import samples
from calls import Call, draw
from helpers import FLOATING, dtype_name


@given(st.integers(1, 40), st.integers(1, 99), st.integers(0, 10**6))
def test_is_the_least_that_covers_enough(count: int, percent: int, seed: int) -> None:
    torch.manual_seed(seed)
    lower, width, target = torch.randint(-20, 20, (3, count)).double()
    upper = lower + width.abs()
    offset = conformal_offset(lower, upper, target, alpha=percent / 100).item()
    needed = math.ceil((count + 1) * (1 - Fraction(percent, 100)))

    def covered(offset: float) -> int:
        inside = (lower - offset <= target) & (target <= upper + offset)
        return int(inside.sum())

    if needed > count:
        assert offset == math.inf
    else:
        assert covered(offset) >= needed
        assert covered(offset - 1) < needed  # all numbers are whole


def test_rank_is_exact() -> None:
    """In floating-point arithmetic, 10 * (1 - 0.7) is above 3."""
    zeros, target = torch.zeros(9), torch.arange(1.0, 10)
    assert conformal_offset(zeros, zeros, target, alpha=0.7) == 3
    assert conformal_offset(zeros, zeros, target, alpha=0.1) == 9
    assert conformal_offset(zeros, zeros, target, alpha=0.09) == math.inf


def test_covers_new_points() -> None:
    """The coverage over random calibration sets has the mean j / (n + 1)."""
    calibration, test = torch.randn(4000, 19).double(), torch.randn(4000).double()
    hits = 0
    for row, value in zip(calibration, test, strict=True):
        offset = conformal_offset(-torch.ones(19).double(), torch.ones(19).double(), row, alpha=0.1)
        hits += int(-1 - offset <= value <= 1 + offset)
    # 18 of 20; five standard deviations, a false alarm in two million.
    assert abs(hits / 4000 - 0.9) < 5 * math.sqrt(0.9 * 0.1 / 4000)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_dtypes_and_gradients(dtype: torch.dtype) -> None:
    lower, upper = torch.zeros(3, dtype=dtype, requires_grad=True), torch.ones(3, dtype=dtype)
    target = torch.tensor([0.5, 0.25, 0.125], dtype=dtype)
    offset = conformal_offset(lower, upper, target, alpha=0.5)
    assert offset.dtype == dtype
    assert offset == -0.25
    assert not offset.requires_grad
    assert conformal_offset(lower, upper, target * torch.nan, alpha=0.5).isnan()
    assert conformal_offset(lower, upper, torch.full_like(target, torch.inf), alpha=0.5).isinf()
    one_of_them = target.clone()
    one_of_them[2] = torch.nan
    assert conformal_offset(lower, upper, one_of_them, alpha=0.5).isnan()


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        *(
            ("alpha must be a number above 0 and below 1", ValueError, {"alpha": alpha})
            for alpha in (0.0, 1.0, -0.1, math.nan)
        ),
        ("alpha must be a number", TypeError, {"alpha": "0.1"}),
        (r"lower must be of shape \(n\), n >= 1", ValueError, {"lower": torch.zeros(4, 1)}),
        (r"lower must be of shape \(n\), n >= 1", ValueError, {"lower": torch.zeros(0)}),
        (r"upper must be of shape \(4,\)", ValueError, {"upper": torch.zeros(3)}),
        (r"target must be of shape \(4,\)", ValueError, {"target": torch.zeros(5)}),
        ("lower must be a floating", TypeError, {"lower": torch.zeros(4).int()}),
        ("upper must be a floating", TypeError, {"upper": torch.zeros(4).int()}),
        ("target must be a floating", TypeError, {"target": torch.zeros(4).int()}),
        ("upper must lie on the device", ValueError, {"upper": torch.zeros(4, device="meta")}),
    ],
)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = dict.fromkeys(("lower", "upper", "target"), torch.zeros(4))
    with pytest.raises(error, match=f"conformal_offset: {message}"):
        conformal_offset(**(arguments | {"alpha": 0.1} | change))


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            conformal_offset,
            lambda: {"lower": draw(9), "upper": draw(9) + 3, "target": draw(9)},
            options=({"alpha": 0.2},),
        ),
    ]
