"""The statistics of a linear head's logits in plain PyTorch, tile by tile of tokens and classes.

No more than three tiles of logits exist at any time. The backward computes them again.
"""

import torch
from torch import Tensor

from tilework._operators import computation_dtype
from tilework.losses._classes import tiles
from tilework.losses._classes.kept import note
from tilework.losses._classes.tiles import (
    NEGLIGIBLE,
    Head,
    Statistics,
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


def forward(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    moments: bool,
    gradient_filter: float | None,
) -> Statistics:
    """See ``reference.linear_logit_stats``."""
    rows, (hidden, kept_target) = kept_rows(target == ignore_index, input, target)
    head = Head(hidden, linear_weight, linear_bias, softcap, temperature)
    statistics = hidden.new_zeros(6 if moments else 4, len(hidden), dtype=head.dtype)
    argmax = torch.zeros_like(kept_target if moments else kept_target[:0])
    for tokens in head.tokens():
        shift, total, target_gap, class_gap, *extra = statistics[:, tokens]
        peak = torch.full_like(shift, -torch.inf)
        target_logit = torch.full_like(shift, torch.nan)
        weight_seen = shift.new_zeros(())
        if moments:
            moment, top = extra
            top.fill_(-torch.inf)
        for classes in head.classes():
            logits = head.outputs(tokens, classes)
            if moments:
                _raise_top(top, argmax[tokens], logits, classes.start)
            head.cap(logits)
            column = kept_target[tokens] - classes.start
            inside = (column >= 0) & (column < logits.shape[1])
            here = logits.gather(1, column.where(inside, 0)[:, None])[:, 0]
            target_logit = here.where(inside, target_logit)

            old_peak, peak = peak, torch.maximum(peak, logits.amax(1))
            # A row of -inf alone has no finite peak to subtract.
            new_shift = peak.where(peak != -torch.inf, 0)
            logits.sub_(new_shift[:, None])
            if class_weight is not None:
                class_gap += (new_shift - shift) * weight_seen - logits @ class_weight[classes]
                weight_seen = weight_seen + class_weight[classes].sum()
            decay = (old_peak - new_shift).exp_()
            if moments:
                moment.addcmul_(new_shift - shift, total).mul_(decay)
                gaps = logits.clamp(min=NEGLIGIBLE)
                moment.sub_(gaps.mul_(logits.exp_()).sum(1))
            else:
                logits.exp_()
            total.mul_(decay).add_(logits.sum(1))
            shift.copy_(new_shift)
        torch.sub(shift, target_logit, out=target_gap)
    statistics = spread(statistics, rows, len(input), dim=1)
    argmax = spread(argmax, rows, len(input), dim=0) if moments else argmax
    ignored = target == ignore_index
    statistics.masked_fill_(ignored, 0)
    statistics[1].masked_fill_(ignored, 1)
    if moments:
        argmax.masked_fill_(ignored, 0)
    shift, total, target_gap, class_gap, *extra = (values.clone() for values in statistics)
    moment, top = extra if moments else (shift.new_empty(0), shift.new_empty(0))
    return shift, total, target_gap, class_gap, moment, top, argmax


def backward(
    grad_total: Tensor,
    grad_target_gap: Tensor,
    grad_class_gap: Tensor,
    grad_moment: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    shift: Tensor,
    total: Tensor,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    gradient_filter: float | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; an empty tensor for each that is not needed.

    With ``gradient_filter``, on the CPU, classes whose gradients are small in every row of a tile
    are left out of the products for input and weight.
    """
    rows, (hidden, kept_target) = kept_rows(target == ignore_index, input, target)
    upstream = [grad_total, grad_target_gap, grad_class_gap]
    if grad_moment is not None:
        upstream.append(grad_moment)
    vectors = torch.stack((shift, total, *upstream))
    vectors[2:].div_(temperature)
    vectors.masked_fill_(target == ignore_index, 0)
    # Ignored rows that are computed on zeros must not overflow by their bias.
    vectors[0].masked_fill_(target == ignore_index, torch.inf)
    if rows is not None:
        vectors = vectors.index_select(1, rows)
    head = Head(hidden, linear_weight, linear_bias, softcap, temperature)

    # On other devices the host would have to wait for what is small.
    filters = input.device.type == "cpu"
    unspent: dict[int, float] = {}

    def gradient(tokens: slice, classes: slice) -> tuple[Tensor, Tensor | None]:
        row_shift, row_total, grad_sum, grad_target, grad_class, *extra = vectors[:, tokens]
        logits = head.outputs(tokens, classes)
        slope = head.cap(logits, need_slope=True)
        logits.sub_(row_shift[:, None])
        if extra:
            (grad_entry,) = extra
            entry = logits.clamp(min=NEGLIGIBLE).mul_(-grad_entry[:, None])
            grad = logits.exp_().mul_(entry.add_((grad_sum - grad_entry)[:, None]))
        else:
            grad = logits.exp_().mul_(grad_sum[:, None])
        column = kept_target[tokens] - classes.start
        inside = (column >= 0) & (column < grad.shape[1])
        grad.scatter_add_(
            1, column.where(inside, 0)[:, None], -grad_target.where(inside, 0)[:, None]
        )
        if class_weight is not None:
            grad.addr_(grad_class, class_weight[classes], alpha=-1)
        large = None
        if gradient_filter is not None and filters:
            # What a tile does not use of its share of the bound is left to the next ones.
            share = gradient_filter * grad.shape[1] / len(linear_weight)
            budget = unspent.get(tokens.start, 0.0) + share
            scale = filter_scale(grad_sum, extra[0] if extra else None, row_total)
            scale.clamp_(min=torch.finfo(scale.dtype).tiny)  # rows without gradients lose nothing
            sizes = (grad / scale[:, None]).abs_().amax(0)
            sizes[column[inside]] = torch.inf
            large, spent = large_classes(sizes, budget)
            note(lambda: (len(large), len(sizes)))
            unspent[tokens.start] = budget - spent
        return grad if slope is None else grad.mul_(slope), large

    grad_hidden, grad_weight, grad_bias = head.gradients(needed, gradient)
    if needed[0]:
        grad_hidden = spread(grad_hidden, rows, len(input), dim=0)
    return grad_hidden, grad_weight, grad_bias


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
