"""The z-loss, against torch's logsumexp."""

import math

import pytest
import torch
from torch import Tensor

from tilework.losses import ZLoss, linear_cross_entropy, linear_z_loss, z_loss

import samples
from losses.linear_forms import LinearForm
from losses.samples import Loss, class_index


def definition(
    input: Tensor,
    target: Tensor | None = None,
    *,
    coefficient: float = 1e-4,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    losses = coefficient * torch.logsumexp(input, 1) ** 2
    if target is not None:
        losses = (
            losses[target != ignore_index]
            if reduction != "none"
            else losses.where(target != ignore_index, 0)
        )
    return losses if reduction == "none" else getattr(losses, reduction)()


REFUSED: samples.Refusals = tuple(
    ("coefficient must be a finite number of at least 0", ValueError, {"coefficient": outside})
    for outside in (-1e-3, math.inf, math.nan)
)


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            z_loss,
            definition,
            ZLoss,
            options=({}, {"coefficient": 0.5}),
            refuses=(*REFUSED, ("coefficient must be a number", TypeError, {"coefficient": "1"})),
        ),
        Loss(
            z_loss,
            definition,
            ZLoss,
            lambda: {"input": torch.randn(5, 4, 3, dtype=torch.float64)},
            batched=("input",),
            class_index=False,
        ),
    ]


@samples.of(LinearForm)
def forms() -> list[LinearForm]:
    return [
        LinearForm(linear_z_loss, definition, options=({}, {"coefficient": 0.5}), refuses=REFUSED)
    ]


def test_rows_of_log_sum_0_add_nothing() -> None:
    input = class_index(9)["input"].log_softmax(1)
    torch.testing.assert_close(z_loss(input, coefficient=1.0), torch.zeros(()).double())


def test_is_the_mean_of_squares() -> None:
    input = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert z_loss(input, coefficient=1.0).item() == pytest.approx(expected)
    target = torch.tensor([-100, 0])
    assert z_loss(input, target, coefficient=1.0).item() == pytest.approx(math.log(4) ** 2)


def test_coefficient_0_gives_0() -> None:
    assert z_loss(class_index(9)["input"], coefficient=0.0) == 0


def test_linear_form_without_targets_keeps_all() -> None:
    hidden, head = torch.randn(2, 5, 4).double(), torch.randn(9, 4).double()
    for ignore_index in (-100, 0):
        actual = linear_z_loss(
            hidden, head, coefficient=1.0, ignore_index=ignore_index, reduction="none"
        )
        torch.testing.assert_close(actual, torch.logsumexp(hidden @ head.T, 2) ** 2)


def test_linear_form_is_the_term_of_linear_cross_entropy() -> None:
    hidden, head, target = torch.randn(12, 4), torch.randn(9, 4), torch.randint(9, (12,))
    target[3] = -100
    both = linear_cross_entropy(hidden, head, target, z_loss=0.3)
    expected = both - linear_cross_entropy(hidden, head, target)
    torch.testing.assert_close(linear_z_loss(hidden, head, target, coefficient=0.3), expected)
