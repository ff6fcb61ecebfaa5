"""Blocks of logits in plain PyTorch: their statistics, and the gradients that they turn into.

A block stays in a CPU's last cache between the passes over it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tilework import _checks, _torch
from tilework._operators import computation_dtype
from tilework.losses._classes.statistics import Formula, Rows, Statistics
from tilework.losses._classes.tiles import NEGLIGIBLE, slices

ELEMENTS = 2**20  # logits of a block: 4 MiB in float32


class Block(NamedTuple):
    """What a gradient needs of a block, in the computation dtype."""

    probabilities: Tensor
    divisor: Tensor
    """What the exponentials were divided by, which is less exact than their total."""
    column: Tensor
    """The class of each position, in a dimension of the classes."""
    kept: Tensor
    others: Tensor | None
    """The logits, 0 at the targets."""
    gaps: Tensor | None
    """``shift - z``, bounded."""


def places(input: Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """The blocks of logits of shape (N, C) or (N, C, S): places of positions, and of logits."""
    rows, classes, *inner = input.shape
    row = classes * (inner[0] if inner else 1)
    for n in slices(rows, max(1, ELEMENTS // max(1, row))):
        if not inner:
            yield (n,), (n,)
            continue
        step = inner[0] if row <= ELEMENTS else ELEMENTS // classes
        for s in slices(inner[0], max(1, step)):
            yield (n, s), (n, slice(None), s)


def of_probabilities(
    function: Callable[[Tensor, Tensor], Tensor], input: Tensor, target: Tensor
) -> Tensor:
    """A function of probabilities, which it may overwrite, and targets, block by block.

    It has no gradient, and gives one number for each position. Where blocks are of no use, it gets
    all probabilities at once.
    """
    dtype = computation_dtype(input.dtype)
    if not is_eager(input):
        return function(input.to(dtype).softmax(1), target)
    result = input.new_empty(target.shape, dtype=dtype)
    memory = scratch(input)
    for place, logits_place in places(input):
        logits = input[logits_place]
        out = block_of(memory, logits)
        values = logits if logits.dtype == dtype else out.copy_(logits)
        result[place] = function(torch.softmax(values, 1, out=out), target[place])
    return result


def is_eager(input: Tensor) -> bool:
    """Whether blocks can be taken one after another: plain tensors of a CPU, not traced."""
    return _checks.holds_values(input) and not _torch.transforms_are_active()


def scratch(input: Tensor) -> Tensor:
    """Memory for the largest block, in the computation dtype."""
    first = next(places(input), None)
    size = 0 if first is None else input[first[1]].numel()
    return input.new_empty(size, dtype=computation_dtype(input.dtype))


def block_of(memory: Tensor, logits: Tensor) -> Tensor:
    """The part of scratch memory that is a block of the logits' shape."""
    return memory[: logits.numel()].view(logits.shape)


def measure(
    logits: Tensor,
    out: Tensor,
    target: Tensor,
    ignore_index: int,
    class_weight: Tensor | None,
    squares: bool,
    moments: bool,
) -> tuple[Statistics, Block]:
    """The statistics of a block; ``out``, which may be the logits, becomes its probabilities."""
    kept = target != ignore_index
    inside = (target >= 0) & (target < logits.shape[1])
    column = target.where(inside, 0).unsqueeze(1)
    values = logits if logits.dtype == out.dtype else out.copy_(logits)
    none = out.new_empty(0)
    top, argmax = none, target[:0].flatten()
    if moments:
        shift, argmax = values.max(1)
        top, argmax = shift.where(kept, 0), argmax.where(kept, 0)
    else:
        shift = values.amax(1)
    target_gap = (shift - values.gather(1, column).squeeze(1)).where(inside, torch.nan)
    others, squared, moment = None, none, none
    if squares:
        others = values.clone().scatter_(1, column, 0)
        # In place: every further block that is freed goes back to the system, and comes as new.
        squared = others.square_().sum(1).where(kept, 0)
        others.copy_(values).scatter_(1, column, 0)
    gaps = _gaps(values, shift) if moments else None
    class_gap = torch.zeros_like(shift)
    if class_weight is not None:
        values = torch.sub(values, shift.unsqueeze(1), out=out)
        class_gap = -_weighted(values, class_weight)
    torch.softmax(values, 1, out=out)
    divisor = out.amax(1).reciprocal_()  # that of the largest logit has the exponential 1
    total = divisor * out.sum(1)
    if gaps is not None:
        moment = ((out * gaps).sum(1) * divisor).where(kept, 0)
    statistics = Statistics(
        shift.where(kept, 0),
        total.where(kept, 1),
        target_gap.where(kept, 0),
        class_gap.where(kept, 0),
        squared,
        moment,
        top,
        argmax,
    )
    return statistics, Block(out, divisor, column, kept, others, gaps)


def measure_again(
    logits: Tensor,
    out: Tensor,
    target: Tensor,
    ignore_index: int,
    shift: Tensor,
    total: Tensor,
    squares: bool,
    moments: bool,
) -> Block:
    """What a gradient needs of a block whose shift and total are known."""
    inside = (target >= 0) & (target < logits.shape[1])
    column = target.where(inside, 0).unsqueeze(1)
    values = logits if logits.dtype == out.dtype else out.copy_(logits)
    others = values.clone().scatter_(1, column, 0) if squares else None
    gaps = _gaps(values, shift) if moments else None
    torch.softmax(values, 1, out=out)
    divisor = total / out.sum(1)
    return Block(out, divisor, column, target != ignore_index, others, gaps)


def _gaps(values: Tensor, shift: Tensor) -> Tensor:
    return (shift.unsqueeze(1) - values).clamp_(max=-NEGLIGIBLE)


def _is_uniform(class_weight: Tensor) -> bool:
    """Whether all weights are one number, which saves passes."""
    return class_weight.stride(0) == 0


def _weighted(values: Tensor, class_weight: Tensor) -> Tensor:
    """The sums of a block's values times class weights."""
    if _is_uniform(class_weight):
        return values.sum(1).mul_(class_weight[0])
    return class_weight @ values if values.dim() == 3 else values @ class_weight


def differentiate_(block: Block, grads: Statistics, class_weight: Tensor | None) -> None:
    """Turn the probabilities of a block into the gradient of its logits."""
    values, divisor, column, kept, others, gaps = block
    scale = torch.zeros_like(divisor) if grads.total is None else grads.total * divisor
    scale = scale.unsqueeze(1)
    if class_weight is not None and grads.class_gap is not None:
        of_classes = grads.class_gap.unsqueeze(1)
    else:
        of_classes, class_weight = scale, None
    if gaps is not None and grads.moment is not None:
        slope = (grads.moment * divisor).unsqueeze(1)
        values.mul_(gaps.mul_(slope).add_(scale - slope))
    else:
        values.mul_(scale)
    if class_weight is not None and _is_uniform(class_weight):
        values.sub_(of_classes * class_weight[0])
    elif class_weight is not None:
        weights = class_weight if values.dim() == 2 else class_weight[:, None]
        values.addcmul_(of_classes, weights, value=-1)
    if others is not None and grads.squares is not None:
        values.addcmul_(others, grads.squares.unsqueeze(1), value=2)
    if grads.target_gap is not None:
        values.scatter_add_(1, column, -grads.target_gap.unsqueeze(1).to(values.dtype))
    if values.device.type != "cpu" or not bool(kept.all()):
        values.masked_fill_(~kept.unsqueeze(1), 0)


def losses_and_gradient_(
    logits: Tensor,
    out: Tensor,
    target: Tensor,
    ignore_index: int,
    class_weight: Tensor | None,
    formula: Formula,
    rows: Rows,
    numbers: Sequence[float],
) -> Tensor:
    """The losses of a block's positions; ``out``, which may be the logits, becomes the gradient."""
    statistics, block = measure(
        logits, out, target, ignore_index, class_weight, formula.squares, formula.moments
    )
    losses, grads = formula.gradients(statistics, rows, numbers)
    differentiate_(block, grads, class_weight)
    return losses.where(block.kept, 0)
