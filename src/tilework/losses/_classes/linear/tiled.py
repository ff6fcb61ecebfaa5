"""The statistics of a linear head's logits in plain PyTorch, tile by tile of tokens and classes.

No more than three tiles of logits exist at any time. The backward computes them again.
"""

import torch
from torch import Tensor

from tilework._operators import Gradients, Needed, computation_dtype
from tilework.losses._classes import tiles
from tilework.losses._classes.kept import note
from tilework.losses._classes.linear.common import LinearStats
from tilework.losses._classes.statistics import Statistics, empty, is_wanted, masked, of_wanted
from tilework.losses._classes.tiles import (
    NEGLIGIBLE,
    Head,
    filter_scale,
    kept_rows,
    spread,
    tile_width,
)


def extra_bytes(input: Tensor, linear_weight: Tensor) -> int:
    """The memory beyond the gradients: three tiles, and the gradients that are added up."""
    size = computation_dtype(input.dtype).itemsize
    width = tile_width(input.shape[0], linear_weight)
    tile = min(input.shape[0], tiles.TOKENS) * width
    return size * (3 * tile + input.numel() + width * input.shape[1])


def forward(given: LinearStats) -> Statistics:
    """See :class:`Statistics`."""
    ignored = given.target == given.ignore_index
    rows, (hidden, kept_target) = kept_rows(ignored, given.input, given.target)
    head = Head(hidden, given.linear_weight, given.linear_bias, given.softcap, given.temperature)
    results = empty(hidden, kept_target, given.squares, given.moments)
    for values in results:
        values.zero_()
    class_weight = given.class_weight
    for tokens in head.tokens():
        some = Statistics(*(values[tokens] for values in results))
        shift, total = some.shift, some.total
        peak = torch.full_like(shift, -torch.inf)
        target_logit = torch.full_like(shift, torch.nan)
        weight_seen = shift.new_zeros(())
        if given.moments:
            some.top.fill_(-torch.inf)
        for classes in head.classes():
            logits = head.outputs(tokens, classes)
            if given.moments:
                _raise_top(some.top, some.argmax, logits, classes.start)
            head.cap(logits)
            column = kept_target[tokens] - classes.start
            inside = (column >= 0) & (column < logits.shape[1])
            here = logits.gather(1, column.where(inside, 0)[:, None])[:, 0]
            target_logit = here.where(inside, target_logit)
            if given.squares:
                others = _others(logits, column, inside, here)
                some.squares.add_(others.square_().sum(1))

            old_peak, peak = peak, torch.maximum(peak, logits.amax(1))
            # A row of -inf alone has no finite peak to subtract.
            new_shift = peak.where(peak != -torch.inf, 0)
            logits.sub_(new_shift[:, None])
            if class_weight is not None:
                gap = (new_shift - shift) * weight_seen - logits @ class_weight[classes]
                some.class_gap.add_(gap)
                weight_seen = weight_seen + class_weight[classes].sum()
            decay = (old_peak - new_shift).exp_()
            if given.moments:
                some.moment.addcmul_(new_shift - shift, total).mul_(decay)
                gaps = logits.clamp(min=NEGLIGIBLE)
                some.moment.sub_(gaps.mul_(logits.exp_()).sum(1))
            else:
                logits.exp_()
            total.mul_(decay).add_(logits.sum(1))
            shift.copy_(new_shift)
        torch.sub(shift, target_logit, out=some.target_gap)
    wanted = {
        name: spread(values, rows, len(ignored), dim=0)
        for name, values in results._asdict().items()
        if is_wanted(name, given.squares, given.moments)
    }
    return masked(results._replace(**wanted), ~ignored)


def _others(logits: Tensor, column: Tensor, inside: Tensor, here: Tensor) -> Tensor:
    """A tile of logits in which those of the targets are 0."""
    filling = here.where(~inside, 0)
    return logits.clone().scatter_(1, column.where(inside, 0)[:, None], filling[:, None])


def backward(
    given: LinearStats, results: Statistics, grads: Statistics, needed: Needed
) -> Gradients:
    """Gradients of the head.

    With ``gradient_filter``, on the CPU, classes whose gradients are small in every row of a tile
    are left out of the products for input and weight.
    """
    grads = of_wanted(grads, given.squares, given.moments)
    ignored, class_weight = given.target == given.ignore_index, given.class_weight
    rows, (hidden, kept_target) = kept_rows(ignored, given.input, given.target)

    def of_rows(values: Tensor | None, filling: float = 0.0) -> Tensor:
        values = torch.zeros_like(results.total) if values is None else values
        values = values.masked_fill(ignored, filling)
        return values if rows is None else values.index_select(0, rows)

    # Ignored rows that are computed on zeros must not overflow by their bias.
    row_shift, row_total = of_rows(results.shift, torch.inf), of_rows(results.total)
    upstream = [
        of_rows(grad) / given.temperature
        for grad in (grads.total, grads.target_gap, grads.class_gap, grads.squares, grads.moment)
    ]
    head = Head(hidden, given.linear_weight, given.linear_bias, given.softcap, given.temperature)

    # On other devices the host would have to wait for what is small.
    filters = given.gradient_filter is not None and given.input.device.type == "cpu"
    unspent: dict[int, float] = {}

    def gradient(tokens: slice, classes: slice) -> tuple[Tensor, Tensor | None]:
        of_total, of_target, of_classes, of_squares, of_moment = (
            values[tokens] for values in upstream
        )
        logits = head.outputs(tokens, classes)
        slope = head.cap(logits, need_slope=True)
        column = kept_target[tokens] - classes.start
        inside = (column >= 0) & (column < logits.shape[1])
        index = column.where(inside, 0)[:, None]
        others = None
        if grads.squares is not None:
            others = _others(logits, column, inside, logits.gather(1, index)[:, 0])
        logits.sub_(row_shift[tokens, None])
        if grads.moment is not None:
            entry = logits.clamp(min=NEGLIGIBLE).mul_(-of_moment[:, None])
            grad = logits.exp_().mul_(entry.add_((of_total - of_moment)[:, None]))
        else:
            grad = logits.exp_().mul_(of_total[:, None])
        grad.scatter_add_(1, index, -of_target.where(inside, 0)[:, None])
        if class_weight is not None:
            grad.addr_(of_classes, class_weight[classes], alpha=-1)
        if others is not None:
            grad.addcmul_(others, of_squares[:, None], value=2)
        large = None
        if given.gradient_filter is not None and filters:
            # What a tile does not use of its share of the bound is left to the next ones.
            share = given.gradient_filter * grad.shape[1] / len(given.linear_weight)
            budget = unspent.get(tokens.start, 0.0) + share
            moment = None if grads.moment is None else of_moment
            scale = filter_scale(of_total, moment, row_total[tokens])
            scale.clamp_(min=torch.finfo(scale.dtype).tiny)  # rows without gradients lose nothing
            sizes = (grad / scale[:, None]).abs_().amax(0)
            sizes[column[inside]] = torch.inf
            large, spent = large_classes(sizes, budget)
            note(lambda: (len(large), len(sizes)))
            unspent[tokens.start] = budget - spent
        return grad if slope is None else grad.mul_(slope), large

    wanted = ["input" in needed, "linear_weight" in needed, "linear_bias" in needed]
    grad_hidden, grad_weight, grad_bias = head.gradients(wanted, gradient)
    if wanted[0]:
        grad_hidden = spread(grad_hidden, rows, len(ignored), dim=0)
    return {"input": grad_hidden, "linear_weight": grad_weight, "linear_bias": grad_bias}


def large_classes(sizes: Tensor, budget: float) -> tuple[Tensor, float]:
    """The classes of a tile to keep, and what the others add up to, which is within the budget."""
    ordered, order = sizes.double().sort(stable=True)
    added = ordered.cumsum(0)
    small = int((added <= budget).sum())
    return order[small:].sort().values, float(added[small - 1]) if small else 0.0


def _raise_top(top: Tensor, argmax: Tensor, values: Tensor, first_class: int) -> None:
    """Take over the largest values of a tile, in place; the first of equal ones stays."""
    tile_top, column = values.max(1)
    higher = (tile_top > top) | (tile_top.isnan() & ~top.isnan())
    top.copy_(tile_top.where(higher, top))
    argmax.copy_((column + first_class).where(higher, argmax))
