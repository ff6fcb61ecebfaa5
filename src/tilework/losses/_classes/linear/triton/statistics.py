"""The kernels of a linear head's statistics and of the gradients of its logits.

The forward kernel keeps running statistics of a share of the classes; a second one merges the
shares. There are no locks and no atomics, and the order of every sum depends on the number of
classes alone.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tilework import _triton
from tilework._triton import Config, Tuned
from tilework.losses._classes.kernels import (
    add_tile,
    grouped_tile,
    outputs,
    store_panel,
    tile_gradient,
)

FORWARD = Tuned(
    {
        "sm_80": Config(128, 128, 32, num_warps=8, num_stages=3),
        "sm_90": Config(128, 128, 64, num_warps=8, num_stages=3),
        "sm_100": Config(128, 128, 64, num_warps=8, num_stages=3),
        "gfx942": Config(128, 128, 32, num_warps=8, num_stages=2),
        "float32": Config(64, 64, 32, num_warps=8, num_stages=2),
        "interpreter": Config(16, 32, 16, num_warps=1, num_stages=1),
    },
    otherwise="float32",
)
# Narrower where the registers of squares or moments would spill.
FORWARD_MORE = FORWARD | {
    "sm_80": Config(128, 64, 32, num_warps=8, num_stages=3),
    "sm_100": Config(128, 64, 64, num_warps=8, num_stages=3),
    "gfx942": Config(128, 64, 32, num_warps=8, num_stages=2),
    "float32": Config(64, 32, 32, num_warps=8, num_stages=2),
}
BACKWARD = FORWARD | {}


class Shares(NamedTuple):
    """Statistics over shares of the classes, (shares, tokens); None for those nobody wants."""

    peak: Tensor
    total: Tensor
    gap: Tensor | None
    squares: Tensor | None
    moment: Tensor | None
    top: Tensor | None
    argmax: Tensor | None


@triton.jit
def forward_kernel(
    head,
    target_ptr,
    class_weight_ptr,
    target_logit_ptr,
    shares,
    sizes,
    inverse_temperature,
    ignore_index,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Statistics of one share of the classes, for one block of tokens."""
    num_tokens, num_classes, share = sizes
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    share_index = tl.program_id(1).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_tokens
    target = tl.load(target_ptr + rows, mask=inside, other=ignore_index)
    kept = inside & (target != ignore_index)
    if tl.max(kept.to(tl.int32), 0) == 0:
        return

    peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    base = tl.zeros((BLOCK_ROWS,), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    gap = tl.zeros((BLOCK_ROWS,), tl.float32)
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    moment = tl.zeros((BLOCK_ROWS,), tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    argmax = tl.zeros((BLOCK_ROWS,), tl.int32)
    weight_seen = 0.0
    first_column = share_index * share
    end = tl.minimum(first_column + share, num_classes)
    while first_column < end:
        columns_end = first_column + BLOCK_COLUMNS
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        column_mask = columns < end
        logits = outputs(
            head,
            first_row,
            first_column,
            num_tokens - first_row,
            end - first_column,
            PRECISION,
            INTERPRETED,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_INNER,
        )
        if shares.moment is not None:
            # Columns past the end repeat the last one, and the first of equal ones counts.
            tile_top = tl.max(logits, 1)
            higher = tile_top > top
            place = tl.where(
                logits == tile_top[:, None], tl.arange(0, BLOCK_COLUMNS)[None, :], 1 << 30
            )
            argmax = tl.where(higher, tl.min(place, 1) + first_column.to(tl.int32), argmax)
            top = tl.where(higher, tile_top, top)
        if head.softcap is not None:
            logits = head.softcap * _triton.tanh(logits / head.softcap)
        logits *= inverse_temperature
        found = kept & (target >= first_column) & (target < tl.minimum(columns_end, end))
        place = tl.where(found, target - first_column, -1).to(tl.int32)
        is_target = tl.arange(0, BLOCK_COLUMNS)[None, :] == place[:, None]
        target_logit = tl.sum(tl.where(is_target, logits, 0.0), 1)
        tl.store(target_logit_ptr + rows, target_logit, mask=found)
        weights = None
        if shares.gap is not None:
            weights = tl.load(class_weight_ptr + columns, mask=column_mask, other=0.0)
        peak, base, total, gap, weight_seen, squares, moment = add_tile(
            logits,
            column_mask[None, :],
            is_target,
            weights,
            peak,
            base,
            total,
            gap,
            weight_seen,
            squares,
            moment,
            shares.squares is not None,
            shares.moment is not None,
        )
        first_column = columns_end
    offsets = share_index * num_tokens + rows
    tl.store(shares.peak + offsets, peak, mask=kept)
    tl.store(shares.total + offsets, total, mask=kept)
    if shares.gap is not None:
        tl.store(shares.gap + offsets, gap, mask=kept)
    if shares.squares is not None:
        tl.store(shares.squares + offsets, squares, mask=kept)
    if shares.moment is not None:
        tl.store(shares.moment + offsets, moment, mask=kept)
        tl.store(shares.top + offsets, top, mask=kept)
        tl.store(shares.argmax + offsets, argmax.to(tl.int64), mask=kept)


@triton.jit
def merge_kernel(
    target_ptr,
    target_logit_ptr,
    share_weight_ptr,
    shares,
    merged,
    num_tokens,
    num_shares,
    ignore_index,
    BLOCK_ROWS: tl.constexpr,
):
    """Merge the shares, in their order, to the statistics ``merged``.

    First the peak of all, then each share's sums as if it had been subtracted there.
    """
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    inside = rows < num_tokens
    target = tl.load(target_ptr + rows, mask=inside, other=ignore_index)
    kept = inside & (target != ignore_index)

    peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    offsets = rows
    for _ in range(num_shares):
        peak = tl.maximum(peak, tl.load(shares.peak + offsets, mask=kept, other=float("-inf")))
        offsets += num_tokens
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    gap = tl.zeros((BLOCK_ROWS,), tl.float32)
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    moment = tl.zeros((BLOCK_ROWS,), tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    argmax = tl.zeros((BLOCK_ROWS,), tl.int64)
    offsets = rows
    for share in range(num_shares):
        share_peak = tl.load(shares.peak + offsets, mask=kept, other=float("-inf"))
        share_sum = tl.load(shares.total + offsets, mask=kept, other=0.0)
        decay = tl.exp(share_peak - base)
        share_base = tl.where(share_peak == float("-inf"), 0.0, share_peak)
        total += share_sum * decay
        if shares.gap is not None:
            share_gap = tl.load(shares.gap + offsets, mask=kept, other=0.0)
            gap += share_gap + (base - share_base) * tl.load(share_weight_ptr + share)
        if shares.squares is not None:
            squares += tl.load(shares.squares + offsets, mask=kept, other=0.0)
        if shares.moment is not None:
            share_moment = tl.load(shares.moment + offsets, mask=kept, other=0.0)
            moment += (share_moment + (base - share_base) * share_sum) * decay
            share_top = tl.load(shares.top + offsets, mask=kept, other=float("-inf"))
            share_argmax = tl.load(shares.argmax + offsets, mask=kept, other=0)
            argmax = tl.where(share_top > top, share_argmax, argmax)
            top = tl.maximum(top, share_top)
        offsets += num_tokens
    target_logit = tl.load(target_logit_ptr + rows, mask=kept, other=0.0)
    tl.store(merged.shift + rows, tl.where(kept, base, 0.0), mask=inside)
    tl.store(merged.total + rows, tl.where(kept, total, 1.0), mask=inside)
    tl.store(merged.target_gap + rows, tl.where(kept, base - target_logit, 0.0), mask=inside)
    tl.store(merged.class_gap + rows, tl.where(kept, gap, 0.0), mask=inside)
    if shares.squares is not None:
        tl.store(merged.squares + rows, tl.where(kept, squares, 0.0), mask=inside)
    if shares.moment is not None:
        tl.store(merged.moment + rows, tl.where(kept, moment, 0.0), mask=inside)
        tl.store(merged.top + rows, tl.where(kept, top, 0.0), mask=inside)
        tl.store(merged.argmax + rows, tl.where(kept, argmax, 0), mask=inside)


@triton.jit
def backward_kernel(
    head,
    target_ptr,
    class_weight_ptr,
    upstream,
    panel,
    mass_ptr,
    first_class,
    inverse_temperature,
    ignore_index,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The gradient of a panel of logits, whose classes begin at ``first_class``.

    All but targets start at the panel's first token or class.
    """
    num_tokens, num_classes = panel.sizes
    row_block, column_block = grouped_tile(panel.sizes, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    first_row, first_column = row_block * BLOCK_ROWS, column_block * BLOCK_COLUMNS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    panel_columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < num_tokens
    column_mask = panel_columns < num_classes
    target = tl.load(target_ptr + rows, mask=row_mask, other=ignore_index)
    kept = row_mask & (target != ignore_index)
    logits = outputs(
        head,
        first_row,
        first_column,
        num_tokens - first_row,
        num_classes - first_column,
        PRECISION,
        INTERPRETED,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_INNER,
    )
    slope = 1.0
    if head.softcap is not None:
        logits = _triton.tanh(logits / head.softcap)
        slope = 1 - logits * logits
        logits *= head.softcap
    logits *= inverse_temperature
    place = target - first_class - first_column
    place = tl.where((place >= 0) & (place < BLOCK_COLUMNS), place, -1).to(tl.int32)
    is_target = tl.arange(0, BLOCK_COLUMNS)[None, :] == place[:, None]
    weights = None
    if upstream.class_gap is not None:
        weights = tl.load(class_weight_ptr + panel_columns, mask=column_mask, other=0.0)
    grad = tile_gradient(logits, upstream, rows, kept, is_target, weights)
    if mass_ptr is not None:
        mass = tl.sum(tl.where(column_mask[None, :], tl.abs(grad), 0.0), 1)
        mass = tl.where(place >= 0, float("inf"), mass)
        offsets = column_block * num_tokens + rows
        tl.store(mass_ptr + offsets, tl.where(kept, mass, 0.0), mask=row_mask)
    grad *= slope * inverse_temperature
    grad = tl.where(kept[:, None] & column_mask[None, :], grad, 0.0)
    store_panel(panel, grad, row_block, column_block, BLOCK_ROWS, BLOCK_COLUMNS)
