"""Cross-entropy with z-loss, against torch's cross-entropy and logsumexp."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilework.losses import CrossEntropyWithZLoss, cross_entropy_with_z_loss

import samples
from losses.samples import Arguments, Loss, class_index


def definition(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 1e-4,
) -> Tensor:
    losses = F.cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    kept = torch.ones_like(losses, dtype=torch.bool)
    weights = kept.to(input.dtype)
    if not target.is_floating_point():
        kept = target != ignore_index
        weights = (weights if weight is None else weight[target.where(kept, 0)]) * kept
    losses = losses + (z_loss * torch.logsumexp(input, 1).square()).where(kept, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / weights.sum()


def soft(weight: bool = False) -> Arguments:
    tensors = class_index(5, 4, weight=weight)
    return tensors | {"target": torch.rand(5, 7, 4).double().softmax(1)}


OPTIONS = ({}, {"label_smoothing": 0.2, "z_loss": 0.3})
ARGUMENTS: dict[str, Any] = {
    "definition": definition,
    "module": CrossEntropyWithZLoss,
    "positional": ("ignore_index", "reduction", "label_smoothing"),
}


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            cross_entropy_with_z_loss,
            options=OPTIONS,
            refuses=(
                (
                    "label_smoothing must be a number from 0 to 1",
                    ValueError,
                    {"label_smoothing": 1.5},
                ),
                ("z_loss must be a finite number of at least 0", ValueError, {"z_loss": -1.0}),
                *(
                    (
                        r"target must be int64 of shape \(4,\), or floating.* of shape \(4, 3\)",
                        error,
                        {"target": target},
                    )
                    for error, target in (
                        (ValueError, torch.zeros(4, 2)),
                        (ValueError, torch.zeros(4)),
                        (ValueError, torch.zeros(4, 3).long()),
                        (TypeError, torch.zeros(4).int()),
                    )
                ),
                (
                    "ignore_index must be negative where the targets are probabilities",
                    ValueError,
                    {"target": torch.zeros(4, 3), "ignore_index": 1},
                ),
                (
                    "target must lie on the device",
                    ValueError,
                    {"target": torch.zeros(4, 3, device="meta")},
                ),
            ),
            **ARGUMENTS,
        ),
        Loss(
            cross_entropy_with_z_loss,
            tensors=lambda: class_index(13, weight=True),
            options=OPTIONS,
            **ARGUMENTS,
        ),
        Loss(
            cross_entropy_with_z_loss,
            tensors=lambda: soft(weight=True),
            options=OPTIONS,
            differentiable=("input", "target"),
            class_index=False,
            **ARGUMENTS,
        ),
    ]


@pytest.mark.parametrize("soft_target", [False, True])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (5, 7, 3), (2, 7, 3, 2)])
def test_without_penalty_is_cross_entropy(shape: tuple[int, ...], soft_target: bool) -> None:
    """In every combination of options."""
    input = torch.randn(shape, dtype=torch.float64)
    dim = min(len(shape) - 1, 1)
    target = torch.randint(7, (*shape[:dim], *shape[dim + 1 :]))
    if soft_target:
        target = torch.rand(shape, dtype=torch.float64).softmax(dim)
    ignored = (-100,) if soft_target else (-100, 3)
    for weight, ignore_index, smoothing, reduction in itertools.product(
        (None, torch.rand(7).double()), ignored, (0.0, 0.1, 1.0), ("none", "sum", "mean")
    ):
        options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": smoothing,
            "reduction": reduction,
        }
        actual = cross_entropy_with_z_loss(input, target, weight, z_loss=0.0, **options)
        expected = F.cross_entropy(input, target, weight, **options)
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_a_shift_changes_the_penalty_only() -> None:
    input, target = class_index(9).values()
    kept = target >= 0
    log_sum = torch.logsumexp(input, 1)[kept]
    actual = cross_entropy_with_z_loss(input + 2, target, z_loss=0.1)
    expected = cross_entropy_with_z_loss(input, target, z_loss=0.1)
    penalties = 0.1 * ((log_sum + 2).square() - log_sum.square())
    torch.testing.assert_close(actual - expected, penalties.mean())


@pytest.mark.untyped
def test_arguments_in_the_order_of_torch() -> None:
    arguments = (torch.rand(7), None, 2, None, "sum", 0.1)
    ours, theirs = CrossEntropyWithZLoss(*arguments, z_loss=0.0), nn.CrossEntropyLoss(*arguments)
    input, target = torch.randn(9, 7), torch.arange(9) % 7
    torch.testing.assert_close(ours(input, target), theirs(input, target))
    for argument in ("size_average", "reduce"):
        message = f"^cross_entropy_with_z_loss: {argument} must be None, .*, got True$"
        with pytest.raises(ValueError, match=message):
            CrossEntropyWithZLoss(**{argument: True})
