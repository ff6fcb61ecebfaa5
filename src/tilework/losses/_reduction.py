"""The reduction of losses that ignore nothing, in one pass over blocks of rows where that pays."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tilework import _torch
from tilework.losses._classes import blocks, early
from tilework.losses._classes.tiles import slices

# Elements of a block, of which a formula makes several tensors that stay in a CPU's last cache.
ELEMENTS = 2**18

Formula = Callable[..., Tensor]
"""Of rows, then constants; as many losses for each row, in the computation dtype."""


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """The losses, their sum or their mean, which is nan over nothing."""
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if reduction == "mean" else losses


def reduce_rows(
    formula: Formula, rows: Sequence[Tensor], constants: Sequence[Tensor], reduction: str
) -> Tensor:
    """The reduced losses of tensors that share their first dimensions, of which some have more.

    A sum or mean of many rows on a CPU takes its gradients in the forward pass, block by block.
    """
    if reduction == "none" or not _pays(rows):
        return reduce(formula(*rows, *constants), reduction)
    leading = min(rows, key=Tensor.dim).shape
    flat = [tensor.reshape(leading.numel(), *tensor.shape[len(leading) :]) for tensor in rows]
    total: Tensor = _Sum.apply(formula, constants, reduction, *flat)  # type: ignore[no-untyped-call]
    return total


def _pays(rows: Sequence[Tensor]) -> bool:
    return (
        all(blocks.is_eager(tensor) for tensor in rows)
        and max(tensor.numel() for tensor in rows) > ELEMENTS
        and early.is_possible(*rows)
        and not _torch.modes_are_active()
    )


class _Sum(torch.autograd.Function):
    """The sum or mean of a formula's losses; its gradients are taken at once."""

    @staticmethod
    def forward(
        ctx: Any, formula: Formula, constants: Sequence[Tensor], reduction: str, *rows: Tensor
    ) -> Tensor:
        ctx.formula, ctx.constants, ctx.reduction = formula, constants, reduction
        wanted = [place for place, tensor in enumerate(rows) if tensor.requires_grad]
        gradients = [torch.empty_like(rows[place]) for place in wanted]
        widest = max(rows, key=Tensor.numel)
        step = max(1, ELEMENTS * len(widest) // widest.numel())
        total: Any = 0
        for some in slices(len(widest), step):
            with _torch.autograd_enabled():
                leaves = [
                    tensor[some].detach().requires_grad_(tensor.requires_grad) for tensor in rows
                ]
                losses = formula(*leaves, *constants)
                per_row = losses.numel() // len(leaves[0])
                share = 1 / (per_row * len(widest)) if reduction == "mean" else 1
                loss = losses.sum() * share
                found = torch.autograd.grad(loss, [leaves[place] for place in wanted])
            for gradient, part in zip(gradients, found, strict=True):
                gradient[some] = part
            total = total + loss.detach()
        ctx.wanted = wanted
        ctx.save_for_backward(*gradients, *rows)
        result: Tensor = total
        return result

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients, rows = saved[: len(ctx.wanted)], saved[len(ctx.wanted) :]
        found = early.hand_over(
            grad_loss,
            dict(zip(ctx.wanted, gradients, strict=True)),
            {place: rows[place] for place in ctx.wanted},
            lambda: reduce(ctx.formula(*rows, *ctx.constants), ctx.reduction),
            frozenset(ctx.wanted),
        )
        return None, None, None, *(found.get(place) for place in range(len(rows)))
