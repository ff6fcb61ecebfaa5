"""The statistics of logits in plain PyTorch, block by block of positions.

The gradient is written where it stays. Beside it no more than three blocks exist at any time.
"""

import torch
from torch import Tensor

from tilework._operators import computation_dtype
from tilework.losses._classes import blocks
from tilework.losses._classes.logits.common import LogitStats, Sum, SummedLoss
from tilework.losses._classes.statistics import FORMULAS, Rows, Statistics, empty, of_wanted


def forward(given: LogitStats) -> Statistics:
    """See :class:`Statistics`. The class weights are those of ``class_gap``."""
    results = empty(given.input, given.target, given.squares, given.moments)
    memory = blocks.scratch(given.input)
    for place, logits_place in blocks.places(given.input):
        logits = given.input[logits_place]
        found, _ = blocks.measure(
            logits,
            blocks.block_of(memory, logits),
            given.target[place],
            given.ignore_index,
            given.class_weight,
            given.squares,
            given.moments,
        )
        for values, part in zip(results, found, strict=True):
            if part.numel():
                values[place] = part
    return results


def backward(
    given: LogitStats, results: Statistics, grads: Statistics, needed: frozenset[str]
) -> dict[str, Tensor]:
    """The gradient of the logits."""
    grads = of_wanted(grads, given.squares, given.moments)
    gradient = torch.empty_like(given.input, memory_format=torch.contiguous_format)
    in_place = gradient.dtype == results.shift.dtype
    memory = None if in_place else blocks.scratch(given.input)
    for place, logits_place in blocks.places(given.input):
        logits, target = given.input[logits_place], given.target[place]
        out = gradient[logits_place]
        values = out if memory is None else blocks.block_of(memory, logits)
        block = blocks.measure_again(
            logits,
            values,
            target,
            given.ignore_index,
            results.shift[place],
            results.total[place],
            grads.squares is not None,
            grads.moment is not None,
        )
        some = Statistics(*(None if grad is None else grad[place] for grad in grads))  # type: ignore[arg-type]
        blocks.differentiate_(block, some, given.class_weight)
        if memory is not None:
            out.copy_(values)
    return {"input": gradient}


def loss_and_gradient(given: SummedLoss) -> Sum:
    """The summed loss, and its gradient in the same pass."""
    gradient = torch.empty_like(given.input, memory_format=torch.contiguous_format)
    dtype = computation_dtype(given.input.dtype)
    memory = None if gradient.dtype == dtype else blocks.scratch(given.input)
    rows = Rows.of(given.weight, given.target_weight, given.input.shape[1], given.class_weight)
    losses = torch.empty_like(given.weight)
    for place, logits_place in blocks.places(given.input):
        logits, out = given.input[logits_place], gradient[logits_place]
        values = out if memory is None else blocks.block_of(memory, logits)
        losses[place] = blocks.losses_and_gradient_(
            logits,
            values,
            given.target[place],
            given.ignore_index,
            given.class_weight,
            FORMULAS[given.formula],
            rows.at(place),
            given.numbers,
        )
        if memory is not None:
            out.copy_(values)
    return Sum(losses.sum(), gradient)
