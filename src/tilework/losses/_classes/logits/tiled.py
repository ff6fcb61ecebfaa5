"""The statistics of logits in plain PyTorch, block by block of positions.

The gradient is written where it stays. Beside it no more than three blocks exist at any time.
"""

import torch
from torch import Tensor

from tilework._operators import computation_dtype
from tilework.losses._classes import blocks
from tilework.losses._classes.logits.common import LogitStats, Sum, SummedLoss
from tilework.losses._classes.statistics import FORMULAS, Rows, Statistics


def forward(given: LogitStats) -> Statistics:
    """See :class:`Statistics`. The class weights are those of ``class_gap``."""
    parts = []
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
        parts.append((place, found))
    return _joined(given, parts)


def _joined(given: LogitStats, parts: list[tuple[tuple[slice, ...], Statistics]]) -> Statistics:
    dtype = computation_dtype(given.input.dtype)
    wanted = {"squares": given.squares}
    wanted |= dict.fromkeys(("moment", "top", "argmax"), given.moments)
    results = {}
    for name in Statistics._fields:
        shape = given.target.shape if wanted.get(name, True) else (0,)
        kind = torch.int64 if name == "argmax" else dtype
        results[name] = given.input.new_empty(shape, dtype=kind)
        if wanted.get(name, True):
            for place, part in parts:
                results[name][place] = getattr(part, name)
    return Statistics(**results)


def backward(
    given: LogitStats, results: Statistics, grads: Statistics, needed: frozenset[str]
) -> dict[str, Tensor]:
    """The gradient of the logits."""
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
    weight = given.class_weight
    rows = Rows(
        given.weight,
        given.target_weight,
        given.input.shape[1],
        None if weight is None else weight.sum(),
    )
    losses = torch.empty_like(given.weight)
    for place, logits_place in blocks.places(given.input):
        logits, out = given.input[logits_place], gradient[logits_place]
        values = out if memory is None else blocks.block_of(memory, logits)
        losses[place] = blocks.losses_and_gradient_(
            logits,
            values,
            given.target[place],
            given.ignore_index,
            weight,
            FORMULAS[given.formula],
            rows.at(place),
            given.numbers,
        )
        if memory is not None:
            out.copy_(values)
    return Sum(losses.sum(), gradient)
