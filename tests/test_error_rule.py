"""The error rule that the tests hold results to, and the luck of a draw."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import helpers
from helpers import DRAWS, Inexact, assert_exact, assert_exact_over_draws

UNIT = torch.finfo(torch.float32).eps


def exceed() -> tuple[Tensor, Tensor, Tensor]:
    """A result that has 1.5 times the allowed error, beside an exact composition."""
    truth = torch.ones(100, dtype=torch.float64)
    return (truth * (1 + 3 * UNIT)).float(), truth.float(), truth


def test_limits() -> None:
    _, exact, truth = exceed()
    for units, error in ((2, None), (3, Inexact), (5, AssertionError)):
        result = (truth * (1 + units * UNIT)).float()
        if error is None:
            assert_exact(result, exact, truth)
            continue
        with pytest.raises(AssertionError, match="in norm 2, at most") as raised:
            assert_exact(result, exact, truth)
        assert raised.type is error
    with pytest.raises(AssertionError) as raised:
        assert_exact(exact.where(truth.cumsum(0) < 100, torch.nan), exact, truth)
    assert raised.type is AssertionError


def judge(errors: Callable[[int], tuple[float, float]], *, length: int = 4) -> None:
    """Draw results with errors in units, of the result and of the composition."""
    seeds = []

    def test() -> None:
        seeds.append(torch.initial_seed())
        truth = torch.ones(length, dtype=torch.float64)
        ours, theirs = errors(len(seeds) - 1)
        assert_exact((1 + ours * UNIT * truth).float(), (1 + theirs * UNIT * truth).float(), truth)

    assert_exact_over_draws(test)
    assert seeds == [helpers.SEED + draw for draw in range(DRAWS)]


def test_luck_of_a_draw_evens_out() -> None:
    judge(lambda draw: (4, 0) if draw == 0 else (2, 2))
    judge(lambda draw: (4, 0) if draw % 2 else (4, 4))


def test_digits_that_are_always_lost_stay_lost() -> None:
    judge(lambda draw: (5, 2))
    for ours, theirs in ((6, 2), (3, 0)):
        with pytest.raises(AssertionError, match="norm 2"):
            judge(lambda draw, each=(ours, theirs): each)
    with pytest.raises(AssertionError, match="norm 2"):
        judge(lambda draw: (100, 1) if draw == 5 else (1, 1))
    with pytest.raises(AssertionError, match="error nan"):
        judge(lambda draw: (float("nan"), 1) if draw == 5 else (1, 1))


def test_draws_that_compare_something_else_do_not_count() -> None:
    draws = []

    def test() -> None:
        draws.append(None)
        for _ in range(1 + len(draws) % 2):
            assert_exact(*exceed() if len(draws) % 2 else (torch.ones(1).double(),) * 3)

    with pytest.raises(Inexact):
        assert_exact_over_draws(test)


def test_failures_of_other_draws_count() -> None:
    draws = []

    def test() -> None:
        draws.append(None)
        assert len(draws) < 3

    with pytest.raises(AssertionError, match="assert 3 < 3"):
        assert_exact_over_draws(test)
    with pytest.raises(Inexact):  # which again judges what is compared
        assert_exact(*exceed())


@pytest.fixture(scope="module")
def calls() -> list[None]:
    return []


def test_a_test_that_exceeds_it_is_drawn_again(calls: list[None]) -> None:
    """This one by its first call and first draw."""
    calls.append(None)
    result, exact, truth = exceed()
    assert_exact(result if len(calls) <= 2 else exact, exact, truth)
