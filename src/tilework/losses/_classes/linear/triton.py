"""The statistics of a linear head's logits on the GPU: kernels, block sizes and launchers.

Forward: a program takes a block of tokens and a share of the classes and keeps running statistics;
a second kernel merges the shares. Backward: a kernel writes the gradient of a panel of logits, and
the library's matrix products turn it into gradients. There are no locks and no atomics, and the
order of every sum depends on the number of classes alone. With a gradient filter, a kernel chooses
the tiles of a panel that count, and the products are kernels that pass over the others. For the
chunked schedule, one kernel turns logits into their gradients in place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilework import _triton
from tilework._triton import Config, Tuned
from tilework.losses._classes.kept import note
from tilework.losses._classes.kernels import (
    MAX_SHARES,
    PANEL_CLASSES,
    PANEL_TOKENS,
    SHARE,
    Head,
    Panel,
    contiguous,
    grouped_tile,
    outputs,
    precision,
    short_strides,
    store_panel,
)
from tilework.losses._classes.tiles import Statistics, accumulate, filter_scale

ROW_BLOCK = 4096  # logits that a program turns into gradients at a time
_IGNORED = -1  # the target of ignored rows where classes are in an order of their own
# The exponential of its negative is 0, and so is its product with that.
NEGLIGIBLE_GAP = tl.constexpr(1000.0)

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
# Narrower where the registers of the moments would spill.
FORWARD_MOMENTS = FORWARD | {
    "sm_80": Config(128, 64, 32, num_warps=8, num_stages=3),
    "sm_100": Config(128, 64, 64, num_warps=8, num_stages=3),
    "float32": Config(64, 32, 32, num_warps=8, num_stages=2),
}
BACKWARD = FORWARD | {}


@triton.jit
def forward_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    class_weight_ptr,
    peak_ptr,
    sum_ptr,
    gap_ptr,
    moment_ptr,
    top_ptr,
    argmax_ptr,
    target_logit_ptr,
    num_tokens,
    num_classes,
    num_features,
    input_stride_row,
    input_stride_feature,
    weight_stride_row,
    weight_stride_feature,
    bias_stride,
    softcap,
    inverse_temperature,
    ignore_index,
    share,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    NEED_MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Statistics of one share of the classes, for one block of tokens."""
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
    moment = tl.zeros((BLOCK_ROWS,), tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    argmax = tl.zeros((BLOCK_ROWS,), tl.int32)
    weight_seen = 0.0
    head = Head(
        input_ptr,
        weight_ptr,
        bias_ptr,
        num_features,
        (input_stride_row, input_stride_feature),
        (weight_stride_row, weight_stride_feature),
        bias_stride,
        None,
    )
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
        if NEED_MOMENTS:
            # Columns past the end repeat the last one, and the first of equal ones counts.
            tile_top = tl.max(logits, 1)
            higher = tile_top > top
            place = tl.where(
                logits == tile_top[:, None], tl.arange(0, BLOCK_COLUMNS)[None, :], 1 << 30
            )
            argmax = tl.where(higher, tl.min(place, 1) + first_column.to(tl.int32), argmax)
            top = tl.where(higher, tile_top, top)
        if HAS_SOFTCAP:
            logits = softcap * _triton.tanh(logits / softcap)
        logits *= inverse_temperature
        found = kept & (target >= first_column) & (target < tl.minimum(columns_end, end))
        place = tl.where(found, target - first_column, -1).to(tl.int32)
        is_target = tl.arange(0, BLOCK_COLUMNS)[None, :] == place[:, None]
        target_logit = tl.sum(tl.where(is_target, logits, 0.0), 1)
        tl.store(target_logit_ptr + rows, target_logit, mask=found)

        # Columns past the end repeat a logit, so they leave the peak as it is.
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        # A row of -inf alone has no finite peak to subtract.
        new_base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        logits -= new_base[:, None]
        if HAS_CLASS_WEIGHT:
            weights = tl.load(class_weight_ptr + columns, mask=column_mask, other=0.0)
            weighted = tl.where(column_mask[None, :], logits * weights[None, :], 0.0)
            gap += (new_base - base) * weight_seen - tl.sum(weighted, 1)
            weight_seen += tl.sum(weights, 0)
        exponentials = tl.where(column_mask[None, :], tl.exp(logits), 0.0)
        decay = tl.exp(peak - new_base)
        if NEED_MOMENTS:
            # A gap of infinity would make nan of a product that is zero.
            gaps = tl.minimum(-logits, NEGLIGIBLE_GAP)
            moment = (moment + (new_base - base) * total) * decay + tl.sum(exponentials * gaps, 1)
        total = total * decay + tl.sum(exponentials, 1)
        peak = new_peak
        base = new_base
        first_column = columns_end
    offsets = share_index * num_tokens + rows
    tl.store(peak_ptr + offsets, peak, mask=kept)
    tl.store(sum_ptr + offsets, total, mask=kept)
    if HAS_CLASS_WEIGHT:
        tl.store(gap_ptr + offsets, gap, mask=kept)
    if NEED_MOMENTS:
        tl.store(moment_ptr + offsets, moment, mask=kept)
        tl.store(top_ptr + offsets, top, mask=kept)
        tl.store(argmax_ptr + offsets, argmax.to(tl.int64), mask=kept)


@triton.jit
def merge_kernel(
    target_ptr,
    peak_ptr,
    sum_ptr,
    gap_ptr,
    moment_ptr,
    top_ptr,
    argmax_ptr,
    share_weight_ptr,
    target_logit_ptr,
    shift_ptr,
    total_ptr,
    target_gap_ptr,
    class_gap_ptr,
    merged_moment_ptr,
    merged_top_ptr,
    merged_argmax_ptr,
    num_tokens,
    num_shares,
    ignore_index,
    HAS_CLASS_WEIGHT: tl.constexpr,
    NEED_MOMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Merge the shares, in their order."""
    rows = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    inside = rows < num_tokens
    target = tl.load(target_ptr + rows, mask=inside, other=ignore_index)
    kept = inside & (target != ignore_index)

    peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    offsets = rows
    for _ in range(num_shares):
        peak = tl.maximum(peak, tl.load(peak_ptr + offsets, mask=kept, other=float("-inf")))
        offsets += num_tokens
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    gap = tl.zeros((BLOCK_ROWS,), tl.float32)
    moment = tl.zeros((BLOCK_ROWS,), tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    argmax = tl.zeros((BLOCK_ROWS,), tl.int64)
    offsets = rows
    for share in range(num_shares):
        share_peak = tl.load(peak_ptr + offsets, mask=kept, other=float("-inf"))
        share_sum = tl.load(sum_ptr + offsets, mask=kept, other=0.0)
        decay = tl.exp(share_peak - base)
        share_base = tl.where(share_peak == float("-inf"), 0.0, share_peak)
        total += share_sum * decay
        if HAS_CLASS_WEIGHT:
            share_gap = tl.load(gap_ptr + offsets, mask=kept, other=0.0)
            gap += share_gap + (base - share_base) * tl.load(share_weight_ptr + share)
        if NEED_MOMENTS:
            share_moment = tl.load(moment_ptr + offsets, mask=kept, other=0.0)
            moment += (share_moment + (base - share_base) * share_sum) * decay
            share_top = tl.load(top_ptr + offsets, mask=kept, other=float("-inf"))
            share_argmax = tl.load(argmax_ptr + offsets, mask=kept, other=0)
            argmax = tl.where(share_top > top, share_argmax, argmax)
            top = tl.maximum(top, share_top)
        offsets += num_tokens
    target_logit = tl.load(target_logit_ptr + rows, mask=kept, other=0.0)
    tl.store(shift_ptr + rows, tl.where(kept, base, 0.0), mask=inside)
    tl.store(total_ptr + rows, tl.where(kept, total, 1.0), mask=inside)
    tl.store(target_gap_ptr + rows, tl.where(kept, base - target_logit, 0.0), mask=inside)
    tl.store(class_gap_ptr + rows, tl.where(kept, gap, 0.0), mask=inside)
    if NEED_MOMENTS:
        tl.store(merged_moment_ptr + rows, tl.where(kept, moment, 0.0), mask=inside)
        tl.store(merged_top_ptr + rows, tl.where(kept, top, 0.0), mask=inside)
        tl.store(merged_argmax_ptr + rows, tl.where(kept, argmax, 0), mask=inside)


@triton.jit
def backward_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    target_ptr,
    class_weight_ptr,
    shift_ptr,
    grad_total_ptr,
    grad_target_gap_ptr,
    grad_class_gap_ptr,
    grad_moment_ptr,
    panel_ptr,
    column_sum_ptr,
    mass_ptr,
    num_tokens,
    first_class,
    num_classes,
    num_features,
    input_stride_row,
    input_stride_feature,
    weight_stride_row,
    weight_stride_feature,
    bias_stride,
    softcap,
    inverse_temperature,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_MOMENT: tl.constexpr,
    NEED_MASS: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The gradient of a panel of logits: ``num_tokens`` rows, ``num_classes`` from ``first_class``.

    All but targets start at the panel's first token or class.
    """
    row_block, column_block = grouped_tile(
        (num_tokens, num_classes), BLOCK_ROWS, BLOCK_COLUMNS, GROUP
    )
    first_row, first_column = row_block * BLOCK_ROWS, column_block * BLOCK_COLUMNS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    panel_columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < num_tokens
    column_mask = panel_columns < num_classes
    target = tl.load(target_ptr + rows, mask=row_mask, other=ignore_index)
    kept = row_mask & (target != ignore_index)
    head = Head(
        input_ptr,
        weight_ptr,
        bias_ptr,
        num_features,
        (input_stride_row, input_stride_feature),
        (weight_stride_row, weight_stride_feature),
        bias_stride,
        None,
    )
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
    if HAS_SOFTCAP:
        logits = _triton.tanh(logits / softcap)
        slope = 1 - logits * logits
        logits *= softcap
    logits *= inverse_temperature
    shift = tl.load(shift_ptr + rows, mask=kept, other=0.0)
    grad_total = tl.load(grad_total_ptr + rows, mask=kept, other=0.0)
    grad_target_gap = tl.load(grad_target_gap_ptr + rows, mask=kept, other=0.0)
    grad = tl.exp(logits - shift[:, None])
    if HAS_MOMENT:
        grad_moment = tl.load(grad_moment_ptr + rows, mask=kept, other=0.0)
        gaps = tl.minimum(shift[:, None] - logits, NEGLIGIBLE_GAP)
        grad *= grad_total[:, None] + grad_moment[:, None] * (gaps - 1)
    else:
        grad *= grad_total[:, None]
    place = target - first_class - first_column
    place = tl.where((place >= 0) & (place < BLOCK_COLUMNS), place, -1).to(tl.int32)
    is_target = tl.arange(0, BLOCK_COLUMNS)[None, :] == place[:, None]
    grad -= tl.where(is_target, grad_target_gap[:, None], 0.0)
    if HAS_CLASS_WEIGHT:
        weights = tl.load(class_weight_ptr + panel_columns, mask=column_mask, other=0.0)
        grad_class_gap = tl.load(grad_class_gap_ptr + rows, mask=kept, other=0.0)
        grad -= grad_class_gap[:, None] * weights[None, :]
    if NEED_MASS:
        mass = tl.sum(tl.where(column_mask[None, :], tl.abs(grad), 0.0), 1)
        mass = tl.where(place >= 0, float("inf"), mass)
        offsets = column_block * num_tokens + rows
        tl.store(mass_ptr + offsets, tl.where(kept, mass, 0.0), mask=row_mask)
    grad *= slope * inverse_temperature
    grad = tl.where(kept[:, None] & column_mask[None, :], grad, 0.0)
    panel = Panel(panel_ptr, column_sum_ptr, (num_tokens, num_classes))
    store_panel(panel, grad, row_block, column_block, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def keep_kernel(
    mass_ptr,
    scale_ptr,
    left_ptr,
    kept_ptr,
    num_tokens,
    num_classes,
    fraction,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Which tiles of a panel's gradient to keep, for one block of rows.

    ``fraction`` is what a class brings to what its row may lose. What a row has left after a tile
    is there for the next ones. A tile is left out if all of its rows can afford it.
    """
    row_block = tl.program_id(0).to(tl.int64)
    rows = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_tokens
    column_blocks = tl.cdiv(num_classes, BLOCK_COLUMNS)
    allowed = fraction * tl.load(scale_ptr + rows, mask=inside, other=0.0)
    left = tl.load(left_ptr + rows, mask=inside, other=0.0)
    kept_ptr += row_block * column_blocks
    mass_ptr += rows
    for block in range(column_blocks):
        mass = tl.load(mass_ptr, mask=inside, other=0.0)
        left += allowed * tl.minimum(num_classes - block * BLOCK_COLUMNS, BLOCK_COLUMNS)
        # False for nan, and for the infinite mass of a target's tile whatever is left.
        fits = (mass <= left) & (mass < float("inf"))
        keep = 1 - tl.min(fits.to(tl.int32), 0)
        left -= tl.where(keep == 0, mass, 0.0)
        tl.store(kept_ptr + block, keep.to(tl.int8))
        mass_ptr += num_tokens
    tl.store(left_ptr + rows, left, mask=inside)


@triton.jit
def kept_product_kernel(
    left_ptr,
    right_ptr,
    total_ptr,
    tiles_ptr,
    count_ptr,
    num_rows,
    num_inner,
    num_columns,
    num_tiles,
    left_stride_row,
    left_stride_inner,
    right_stride_inner,
    right_stride_column,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """Add ``left @ right`` to a block of ``total``, over the tiles of ``left`` that are kept.

    A row of ``tiles`` has the indices of a block of rows, the ``count`` kept ones first; a tile is
    ``BLOCK_ROWS`` x ``TILE``.
    """
    row_block = tl.program_id(1).to(tl.int64)
    count = tl.load(count_ptr + row_block).to(tl.int32)
    if count == 0:
        return
    tiles_ptr += row_block * num_tiles
    first_row = row_block * BLOCK_ROWS
    first_column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS
    rows = tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    inner = tl.arange(0, BLOCK_INNER)
    row_mask = rows < num_rows - first_row
    column_mask = columns < num_columns - first_column
    left_ptr += first_row * left_stride_row
    right_ptr += first_column * right_stride_column
    left_offsets = rows[:, None] * left_stride_row + inner[None, :] * left_stride_inner
    right_offsets = inner[:, None] * right_stride_inner + columns[None, :] * right_stride_column
    STEPS: tl.constexpr = TILE // BLOCK_INNER
    product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for step in range(0, count * STEPS):
        first = tl.load(tiles_ptr + step // STEPS) * TILE + step % STEPS * BLOCK_INNER
        inner_mask = inner < num_inner - first
        left = tl.load(
            left_ptr + first * left_stride_inner + left_offsets,
            mask=row_mask[:, None] & inner_mask[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + first * right_stride_inner + right_offsets,
            mask=inner_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        product = _triton.dot(left, right, product, PRECISION, INTERPRETED)
    total_ptr += first_row * num_columns + first_column
    offsets = rows[:, None] * num_columns + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    product += tl.load(total_ptr + offsets, mask=mask, other=0.0)
    tl.store(total_ptr + offsets, product, mask=mask)


@triton.jit
def logit_gradient_kernel(
    logits_ptr,
    bias_ptr,
    target_ptr,
    class_weight_ptr,
    target_scale_ptr,
    class_scale_ptr,
    square_scale_ptr,
    weight_sum_ptr,
    loss_ptr,
    num_classes,
    bias_stride,
    softcap,
    ignore_index,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_SQUARE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Turn a row of products into the gradient of its loss, in place."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * num_classes
    target = tl.load(target_ptr + row)
    kept = target != ignore_index
    peak = float("-inf")
    base = 0.0
    total = 0.0
    gap = 0.0
    weight_seen = 0.0
    target_logit = 0.0
    for first_column in range(0, num_classes, BLOCK_COLUMNS):
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        inside = columns < num_classes
        logits = tl.load(logits_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        if HAS_BIAS:
            logits += tl.load(bias_ptr + columns * bias_stride, mask=inside, other=0.0).to(
                tl.float32
            )
        if HAS_SOFTCAP:
            logits = softcap * _triton.tanh(logits / softcap)
        target_logit += tl.sum(tl.where(inside & (columns == target), logits, 0.0), 0)
        new_peak = tl.maximum(peak, tl.max(tl.where(inside, logits, float("-inf")), 0))
        # A row of -inf alone has no finite peak to subtract.
        new_base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        logits -= new_base
        if HAS_CLASS_WEIGHT:
            weights = tl.load(class_weight_ptr + columns, mask=inside, other=0.0)
            gap += (new_base - base) * weight_seen
            gap -= tl.sum(tl.where(inside, logits * weights, 0.0), 0)
            weight_seen += tl.sum(weights, 0)
        total = total * tl.exp(peak - new_base)
        total += tl.sum(tl.where(inside, tl.exp(logits), 0.0), 0)
        peak = new_peak
        base = new_base

    log_sum = tl.log(total)
    target_scale = tl.load(target_scale_ptr + row)
    scale = target_scale
    loss = target_scale * (base - target_logit + log_sum)
    class_scale = 0.0
    if HAS_CLASS_WEIGHT:
        class_scale = tl.load(class_scale_ptr + row)
        weight_sum = tl.load(weight_sum_ptr)
        scale += class_scale * weight_sum
        loss += class_scale * (gap + weight_sum * log_sum)
    if HAS_SQUARE:
        square_scale = tl.load(square_scale_ptr + row)
        log_sum += base
        scale += 2 * square_scale * log_sum
        loss += square_scale * log_sum * log_sum
    tl.store(loss_ptr + row, tl.where(kept, loss, 0.0))
    scale /= total
    for first_column in range(0, num_classes, BLOCK_COLUMNS):
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        inside = columns < num_classes
        logits = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            logits += tl.load(bias_ptr + columns * bias_stride, mask=inside, other=0.0).to(
                tl.float32
            )
        slope = 1.0
        if HAS_SOFTCAP:
            logits = _triton.tanh(logits / softcap)
            slope = 1 - logits * logits
            logits *= softcap
        grad = tl.exp(logits - base) * scale - tl.where(columns == target, target_scale, 0.0)
        if HAS_CLASS_WEIGHT:
            weights = tl.load(class_weight_ptr + columns, mask=inside, other=0.0)
            grad -= class_scale * weights
        grad = tl.where(kept, grad * slope, 0.0)
        tl.store(logits_ptr + columns, grad.to(logits_ptr.dtype.element_ty), mask=inside)


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
    input, linear_weight = short_strides(input), short_strides(linear_weight)
    num_tokens, num_features = input.shape
    num_classes = len(linear_weight)
    shift, total, target_gap, class_gap = (
        input.new_empty(num_tokens, dtype=torch.float32) for _ in range(4)
    )
    extra = num_tokens if moments else 0
    moment, top = (input.new_empty(extra, dtype=torch.float32) for _ in range(2))
    argmax = target.new_empty(extra)
    if num_tokens == 0:
        return shift, total, target_gap, class_gap, moment, top, argmax
    share = max(SHARE, triton.cdiv(num_classes, MAX_SHARES))
    num_shares = triton.cdiv(num_classes, share)
    table = FORWARD_MOMENTS if moments else FORWARD
    config = table.choose(_triton.architecture(input.device), input.dtype)
    target = target.contiguous()
    shares = input.new_empty(5 if moments else 3, num_shares, num_tokens, dtype=torch.float32)
    peak, share_total, gap, *share_moments = shares
    share_moments = (
        [*share_moments, target.new_empty(num_shares, num_tokens)] if moments else [None] * 3
    )
    target_logit = torch.full_like(shift, torch.nan)
    share_weight = None
    if class_weight is not None:
        class_weight = class_weight.contiguous()
        padding = num_shares * share - num_classes
        padded = torch.nn.functional.pad(class_weight, (0, padding))
        share_weight = padded.view(num_shares, share).sum(1)
    forward_kernel[(triton.cdiv(num_tokens, config.block_rows), num_shares)](
        input,
        linear_weight,
        linear_bias,
        target,
        class_weight,
        peak,
        share_total,
        gap,
        *share_moments,
        target_logit,
        num_tokens,
        num_classes,
        num_features,
        *input.stride(),
        *linear_weight.stride(),
        0 if linear_bias is None else linear_bias.stride(0),
        softcap or 0.0,
        1 / temperature,
        ignore_index,
        share,
        HAS_SOFTCAP=softcap is not None,
        HAS_CLASS_WEIGHT=class_weight is not None,
        NEED_MOMENTS=moments,
        PRECISION=precision(),
        INTERPRETED=_triton.INTERPRETED,
        **config.arguments(),
    )
    merge_kernel[(triton.cdiv(num_tokens, 128),)](
        target,
        peak,
        share_total,
        gap,
        *share_moments,
        share_weight,
        target_logit,
        shift,
        total,
        target_gap,
        class_gap,
        moment,
        top,
        argmax,
        num_tokens,
        num_shares,
        ignore_index,
        HAS_CLASS_WEIGHT=class_weight is not None,
        NEED_MOMENTS=moments,
        BLOCK_ROWS=128,
    )
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

    With ``gradient_filter``, tiles whose gradients are small in every row are left out of the
    products for input and weight. Classes are taken in the order of their mean logits, so that
    small gradients share tiles.
    """
    input, linear_weight = short_strides(input), short_strides(linear_weight)
    num_tokens, num_features = input.shape
    num_classes = len(linear_weight)
    config = BACKWARD.choose(_triton.architecture(input.device), input.dtype)
    if not (needed[0] or needed[1]):
        gradient_filter = None  # the bias is no product
    filters = gradient_filter is not None
    tile = config.block_rows, config.block_columns
    # Ignored rows have no gradient, and their hidden states are never read.
    ignored = target == ignore_index
    hidden = input.masked_fill(ignored[:, None], 0) if needed[1] or filters else input
    order = None
    if filters:
        order = _by_mean_logit(hidden, ignored, linear_weight, linear_bias)
        target, ignore_index = _places(target, ignored, order), _IGNORED
    tokens = max(1, min(num_tokens, PANEL_TOKENS))
    classes = min(num_classes, PANEL_CLASSES)
    buffer = input.new_empty(tokens * classes)
    column_sums, masses = (
        torch.empty(size, dtype=torch.float32, device=input.device)
        for size in (
            triton.cdiv(tokens, config.block_rows) * classes if needed[2] else 0,
            triton.cdiv(classes, config.block_columns) * tokens if filters else 0,
        )
    )
    target = target.contiguous()
    upstream = [
        contiguous(grad) for grad in (grad_total, grad_target_gap, grad_class_gap, grad_moment)
    ]
    scale = filter_scale(grad_total, grad_moment, total)
    left = torch.zeros_like(scale)

    grad_input = input.new_zeros(input.shape if needed[0] else 0, dtype=torch.float32)
    grad_weight = input.new_empty(linear_weight.shape if needed[1] else 0)
    grad_bias = input.new_zeros(num_classes if needed[2] else 0, dtype=torch.float32)
    for first_class in range(0, num_classes, classes):
        panel_classes = slice(first_class, min(first_class + classes, num_classes))
        width = panel_classes.stop - panel_classes.start
        members = panel_classes if order is None else order[panel_classes]
        weight = linear_weight[members]
        bias = None if linear_bias is None else linear_bias[members]
        class_weights = None if class_weight is None else class_weight[members].contiguous()
        weight_tile = input.new_zeros(
            (width, num_features) if needed[1] else 0, dtype=torch.float32
        )
        for first_token in range(0, num_tokens, tokens):
            panel_tokens = slice(first_token, min(first_token + tokens, num_tokens))
            height = panel_tokens.stop - panel_tokens.start
            panel = buffer[: height * width].view(height, width)
            row_blocks = triton.cdiv(height, config.block_rows)
            backward_kernel[(row_blocks * triton.cdiv(width, config.block_columns),)](
                input[panel_tokens],
                weight,
                bias,
                target[panel_tokens],
                class_weights,
                shift[panel_tokens],
                *(None if grad is None else grad[panel_tokens] for grad in upstream),
                panel,
                column_sums if needed[2] else None,
                masses,
                height,
                first_class,
                width,
                num_features,
                *input.stride(),
                *weight.stride(),
                0 if bias is None else bias.stride(0),
                softcap or 0.0,
                1 / temperature,
                ignore_index,
                HAS_SOFTCAP=softcap is not None,
                HAS_CLASS_WEIGHT=class_weight is not None,
                HAS_MOMENT=grad_moment is not None,
                NEED_MASS=filters,
                PRECISION=precision(),
                INTERPRETED=_triton.INTERPRETED,
                GROUP=8,
                **config.arguments(),
            )
            kept = None
            if gradient_filter is not None:
                kept = kept_tiles(
                    masses,
                    scale[panel_tokens],
                    left[panel_tokens],
                    width,
                    gradient_filter / num_classes,
                    config,
                )
            if needed[0]:
                _accumulate(grad_input[panel_tokens], panel, weight, kept, config, tile)
            if needed[1]:
                transposed = None if kept is None else kept.T
                rows = hidden[panel_tokens]
                _accumulate(weight_tile, panel.T, rows, transposed, config, tile[::-1])
            if needed[2]:
                partials = column_sums[: row_blocks * width].view(row_blocks, width)
                grad_bias[members] += partials.sum(0)
        if needed[1]:
            grad_weight[members] = weight_tile.to(grad_weight.dtype)
    return grad_input.to(input.dtype), grad_weight, grad_bias.to(input.dtype)


def kept_tiles(
    masses: Tensor,
    scale: Tensor,
    left: Tensor,
    num_classes: int,
    fraction: float,
    config: Config,
) -> Tensor:
    """Which tiles of a panel's gradient count, as numbers; what rows have left is updated."""
    row_blocks = triton.cdiv(len(scale), config.block_rows)
    column_blocks = triton.cdiv(num_classes, config.block_columns)
    kept = torch.empty(row_blocks, column_blocks, dtype=torch.int8, device=masses.device)
    keep_kernel[(row_blocks,)](
        masses,
        scale,
        left,
        kept,
        len(scale),
        num_classes,
        fraction,
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLUMNS=config.block_columns,
    )
    note(lambda: (int(kept.sum()), kept.numel()))
    return kept


def _accumulate(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    kept: Tensor | None,
    config: Config,
    tile: tuple[int, int],
) -> None:
    """Add ``left @ right`` to a total in float32, over the tiles of ``left`` that are kept."""
    if kept is None:
        accumulate(total, left, right)
        return
    kept = kept.contiguous()
    num_columns = total.shape[1]
    block_rows, block_inner = tile
    kept_product_kernel[(triton.cdiv(num_columns, config.block_columns), len(kept))](
        left,
        right,
        total,
        kept.argsort(dim=1, descending=True, stable=True),
        kept.sum(1),
        *left.shape,
        num_columns,
        kept.shape[1],
        *left.stride(),
        *right.stride(),
        PRECISION=precision(),
        INTERPRETED=_triton.INTERPRETED,
        TILE=block_inner,
        # The compiler gives half of the stages to reading the list of tiles ahead.
        **config.arguments() | {"BLOCK_ROWS": block_rows, "num_stages": 2 * config.num_stages - 1},
    )


def _by_mean_logit(
    hidden: Tensor, ignored: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> Tensor:
    """Classes from small to large mean logits, before softcap; ignored rows are zeros."""
    mean = hidden.sum(0, dtype=torch.float32) / ignored.logical_not().sum()
    logits = linear_weight @ mean.to(hidden.dtype)
    if linear_bias is not None:
        logits = logits + linear_bias
    return logits.argsort(stable=True)


def _places(target: Tensor, ignored: Tensor, order: Tensor) -> Tensor:
    """Where targets lie in an order of classes; beyond it for those that are no classes."""
    num_classes = len(order)
    place = torch.empty_like(order)
    place[order] = torch.arange(num_classes, device=order.device)
    inside = (target >= 0) & (target < num_classes)
    places = place[target.where(inside, 0)].where(inside, num_classes)
    return places.masked_fill(ignored, _IGNORED)


def logit_gradient_(
    logits: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    target_scale: Tensor,
    class_scale: Tensor | None,
    square_scale: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    grad_bias: Tensor | None,
) -> Tensor:
    """See ``chunked.logit_gradient_``."""
    losses = torch.empty_like(target_scale)
    if len(logits) == 0:
        return losses
    logit_gradient_kernel[(len(logits),)](
        logits,
        linear_bias,
        target.contiguous(),
        contiguous(class_weight),
        target_scale,
        class_scale,
        square_scale,
        None if class_weight is None else class_weight.sum(),
        losses,
        logits.shape[1],
        0 if linear_bias is None else linear_bias.stride(0),
        softcap or 0.0,
        ignore_index,
        HAS_BIAS=linear_bias is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_CLASS_WEIGHT=class_weight is not None,
        HAS_SQUARE=square_scale is not None,
        BLOCK_COLUMNS=ROW_BLOCK,
        num_warps=8,
    )
    if grad_bias is not None:
        grad_bias += logits.sum(0, dtype=torch.float32)
    return losses
