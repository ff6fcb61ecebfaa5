"""How formulas are registered, and what their gradients are."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tilework.losses  # noqa: F401  registers the formulas
from tilework.losses._classes import statistics
from tilework.losses._classes.statistics import (
    FORMULAS,
    Rows,
    Statistics,
    empty,
    formula,
    is_wanted,
    masked,
    of_wanted,
)

from helpers import FLOATING, dtype_name

FIELDS = Statistics._fields
# The numbers that each loss gives its formula.
NUMBERS: dict[str, tuple[float, ...]] = {
    "cross_entropy": (0.1, 0.01),
    "comp_sum_loss": (1.5,),
    "squentropy": (),
    "z_loss": (0.5,),
}


def draw(rows: int = 6, dtype: torch.dtype = torch.float64) -> Statistics:
    """Numbers that could be statistics, apart from each other."""
    values = {name: torch.rand(rows, dtype=dtype) + 1 for name in FIELDS}
    return Statistics(**(values | {"argmax": torch.randint(9, (rows,))}))


def draw_rows(rows: int = 6, *, spreads: bool) -> Rows:
    weight = torch.rand(rows, dtype=torch.float64)
    class_weight = torch.rand(9, dtype=torch.float64) if spreads else None
    return Rows.of(weight, weight * 2, 9, class_weight)


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "FORMULAS", FORMULAS.copy())

    @formula("test_of_registration", moments=True)
    def function(found: Statistics, rows: Rows) -> Tensor:
        return found.nll

    found = statistics.FORMULAS["test_of_registration"]
    assert (found.function, found.squares, found.moments) == (function, False, True)
    assert "test_of_registration" not in FORMULAS


@pytest.mark.parametrize("spreads", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_those_of_autograd(name: str, spreads: bool) -> None:
    """Through every statistic that a formula reads, in and outside of a kernel."""
    tested, numbers = FORMULAS[name], NUMBERS[name]
    given, rows = draw(), draw_rows(spreads=spreads)
    losses, grads = tested.gradients(given, rows, numbers)
    leaves = Statistics(*(v.clone().requires_grad_(v.is_floating_point()) for v in given))
    truth = tested.function(leaves, rows, *numbers)
    torch.testing.assert_close(losses, truth.detach(), rtol=0, atol=0)
    assert not losses.requires_grad
    used = {"total", "target_gap"} | ({"class_gap"} if spreads else set())
    used |= ({"squares"} if tested.squares else set()) | ({"moment"} if tested.moments else set())
    expected = torch.autograd.grad(
        truth.sum(), [getattr(leaves, field) for field in FIELDS[:-1]], allow_unused=True
    )
    for field, gradient in zip(FIELDS[:-1], expected, strict=True):
        actual = getattr(grads, field)
        if gradient is None or field in ("shift", "top"):  # constants
            assert actual is None
        else:
            assert field in used, f"{name} must say that it reads {field}"
            torch.testing.assert_close(actual, gradient)
    assert grads.argmax is None
    with torch.no_grad():
        again = tested.gradients(given, rows, numbers)[1]
    for field in FIELDS:
        one, other = getattr(grads, field), getattr(again, field)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("spreads", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_are_proportional_to_the_weights(name: str, spreads: bool) -> None:
    """As a mean divides these before the formula sees them."""
    tested, numbers = FORMULAS[name], NUMBERS[name]
    given, rows = draw(), draw_rows(spreads=spreads)
    scale = torch.rand(6, dtype=torch.float64) * 4
    scaled = rows._replace(weight=rows.weight * scale, target_weight=rows.target_weight * scale)
    torch.testing.assert_close(
        tested.function(given, scaled, *numbers),
        tested.function(given, rows, *numbers) * scale,
    )


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_room_for_what_was_asked_for(dtype: torch.dtype, squares: bool, moments: bool) -> None:
    input, target = torch.zeros(2, 5, 3, dtype=dtype), torch.zeros(2, 3, dtype=torch.int64)
    room = empty(input, target, squares, moments)
    wide = torch.promote_types(dtype, torch.float32)
    wanted = dict.fromkeys(FIELDS, True) | {"squares": squares}
    wanted |= dict.fromkeys(("moment", "top", "argmax"), moments)
    grads = of_wanted(draw(), squares, moments)
    for name in FIELDS:
        values = getattr(room, name)
        assert values.dtype == (torch.int64 if name == "argmax" else wide)
        assert values.shape == ((2, 3) if wanted[name] else (0,))
        assert is_wanted(name, squares, moments) == wanted[name]
        assert (getattr(grads, name) is not None) == wanted[name]


def test_masked() -> None:
    given = draw(3)._replace(squares=torch.zeros(0))
    kept = torch.tensor([True, False, True])
    found = masked(given, kept)
    for name in FIELDS:
        before, after = getattr(given, name), getattr(found, name)
        if name == "squares":
            assert after.numel() == 0
        else:
            assert after[1] == (1 if name == "total" else 0)
            assert torch.equal(after[kept], before[kept])


def test_losses_of_a_position() -> None:
    logits = torch.randn(4, 7, dtype=torch.float64)
    target = torch.tensor([3, 0, 6, 2])
    shift = logits.amax(1)
    found = draw(4)._replace(
        shift=shift,
        total=(logits - shift[:, None]).exp().sum(1),
        target_gap=shift - logits[torch.arange(4), target],
    )
    torch.testing.assert_close(found.lse, logits.logsumexp(1))
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(found.nll, expected)


def test_rows() -> None:
    weight, class_weight = torch.rand(5), torch.rand(9)
    rows = Rows.of(weight, 3 * weight, 9, class_weight)
    torch.testing.assert_close(rows.spread, class_weight.sum())
    assert Rows.of(weight, weight, 9, None).spread is None
    some = rows.at(slice(1, 3))
    assert torch.equal(some.weight, weight[1:3])
    assert torch.equal(some.target_weight, 3 * weight[1:3])
    assert some.classes == 9
    assert some.spread is rows.spread


def test_a_formula_that_says_too_little_has_no_gradient() -> None:
    """What it reads without saying so is a constant, which is why all are tested above."""
    squares = FORMULAS["squentropy"]
    assert squares.squares
    silent = replace(squares, squares=False)
    assert silent.gradients(draw(), draw_rows(spreads=False), ())[1].squares is None
