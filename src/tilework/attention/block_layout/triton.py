"""Lists of blocks on the GPU: kernels and launchers. There are no locks and no atomics.

``sizes`` are heads (to mark a mask, lines: the rows of all heads), rows, columns and the width of
lists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilework.attention.block_layout.common import Dense, Lists, Mask, Positions, TopK

ROW_TILE = 512  # columns of a row at a time, 16 of a thread
ENTRY_TILE = (8, 64)  # rows, and entries of them at a time

# Bits of the same order as the numbers, but for the sign: those of infinity, and all but the sign.
_BITS = {
    torch.float16: (torch.int16, 0x7C00, 0x7FFF),
    torch.bfloat16: (torch.int16, 0x7F80, 0x7FFF),
    torch.float32: (torch.int32, 0x7F80_0000, 0x7FFF_FFFF),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000, 0x7FFF_FFFF_FFFF_FFFF),
}


@triton.jit
def fill(
    bits_ptr,
    stride,
    count_ptr,
    indices_ptr,
    limits,
    IS_CAUSAL: tl.constexpr,
    FORCE_DIAGONAL: tl.constexpr,
    INFINITY: tl.constexpr,
    SIGNLESS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The list of a row: the forced columns, and as many of the highest scores as are missing.

    Scores are compared by integers ``key`` of the same order. While more than ``places`` of them
    reach ``low``, and fewer reach ``high``, the half of what lies between is taken that keeps this
    so. At the end all keys above ``low`` are listed, and of those equal to it the first, as far as
    there is room.
    """
    columns, most, num_sinks, first, last = limits
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    bits = tl.load(bits_ptr + column.to(tl.int64) * stride, mask=inside, other=-1)
    if bits.dtype == tl.int16:
        bits = bits.to(tl.int32)
    key = tl.where(bits < 0, bits ^ SIGNLESS, bits)
    key = tl.where(key == -1, 0, key)  # the two zeros are equal

    live = inside
    if IS_CAUSAL:
        live = live & (column <= last)
    forced = column < num_sinks
    if FORCE_DIAGONAL:
        forced = forced | ((column >= first) & (column <= last))
    forced = forced & live
    # Neither -inf nor nan, which lie beyond the infinities.
    eligible = live & (key >= -INFINITY) & (key <= INFINITY) & (forced == 0)
    num_forced = tl.sum(forced.to(tl.int32), 0)
    places = tl.maximum(most - num_forced, 0)

    # Bisection: at least as many keys as there are places reach ``low``, if there are as many at
    # all, and fewer reach ``high``.
    low = tl.min(tl.where(eligible, key, INFINITY), 0)
    key = tl.where(eligible, key, -INFINITY - 1)
    high = tl.max(key, 0) + 1
    reached = tl.sum(eligible.to(tl.int32), 0)
    while (reached > places) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)  # their sum may overflow
        count = tl.sum((key >= middle).to(tl.int32), 0)
        enough = count >= places
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        reached = tl.where(enough, count, reached)

    # One sum for two counts: of what is kept for certain, and of what ties.
    kept = forced | (key > low)
    tied = key == low
    both = kept.to(tl.int32) + (tied.to(tl.int32) << 16)
    running = tl.cumsum(both, 0)
    total = tl.sum(both, 0)
    num_kept = total & 0xFFFF
    room = places - (num_kept - num_forced)
    ties = running >> 16
    place = (running & 0xFFFF) + tl.minimum(ties, room) - 1
    chosen = kept | (tied & (ties <= room))
    tl.store(indices_ptr + place, column, mask=chosen)
    tl.store(count_ptr, num_kept + tl.minimum(total >> 16, room))


@triton.jit
def topk_kernel(
    bits_ptr,
    places_ptr,
    counts_ptr,
    indices_ptr,
    sizes,
    rule,
    strides,
    places_strides,
    IS_CAUSAL: tl.constexpr,
    FORCE_DIAGONAL: tl.constexpr,
    INFINITY: tl.constexpr,
    SIGNLESS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The list of a row, of a causal one in the upper half without the other half of columns."""
    heads, rows, columns, width = sizes
    most, query_block, key_block, queries, num_sinks = rule
    line = tl.program_id(0)
    row = (line % rows).to(tl.int64)
    head = (line // rows % heads).to(tl.int64)
    batch = (line // rows // heads).to(tl.int64)
    bits_ptr += batch * strides[0] + head * strides[1] + row * strides[2]
    indices_ptr += line.to(tl.int64) * width
    if places_ptr is not None:
        places_ptr += batch * places_strides[0] + head * places_strides[1]
        most = tl.minimum(tl.load(places_ptr + row * places_strides[2]), columns).to(tl.int32)
    first = tl.minimum(row * query_block // key_block, columns).to(tl.int32)
    last = (tl.minimum((row + 1) * query_block, queries) - 1) // key_block
    last = tl.minimum(last, columns).to(tl.int32)
    limits = columns, most, num_sinks, first, last
    if IS_CAUSAL and last < COLUMNS // 2:
        fill(
            bits_ptr,
            strides[3],
            counts_ptr + line,
            indices_ptr,
            limits,
            IS_CAUSAL,
            FORCE_DIAGONAL,
            INFINITY,
            SIGNLESS,
            COLUMNS // 2,
        )
    else:
        fill(
            bits_ptr,
            strides[3],
            counts_ptr + line,
            indices_ptr,
            limits,
            IS_CAUSAL,
            FORCE_DIAGONAL,
            INFINITY,
            SIGNLESS,
            COLUMNS,
        )


@triton.jit
def positions_kernel(
    mask_ptr,
    counts_ptr,
    indices_ptr,
    sizes,
    strides,
    COLUMNS: tl.constexpr,
):
    """The list of a row of a mask."""
    heads, rows, columns, width = sizes
    line = tl.program_id(0)
    mask_ptr += (line // rows // heads).to(tl.int64) * strides[0]
    mask_ptr += (line // rows % heads).to(tl.int64) * strides[1]
    mask_ptr += (line % rows).to(tl.int64) * strides[2]
    indices_ptr += line.to(tl.int64) * width
    count = 0
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        pointers = mask_ptr + column.to(tl.int64) * strides[3]
        keep = tl.load(pointers, mask=column < columns, other=0).to(tl.int32)
        running = count + tl.cumsum(keep, 0)
        tl.store(indices_ptr + running - 1, column, mask=(keep != 0) & (running <= width))
        count += tl.sum(keep, 0)
    tl.store(counts_ptr + line, count)


@triton.jit
def mark_kernel(
    counts_ptr,
    indices_ptr,
    mask_ptr,
    sizes,
    strides,
    LINES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Mark what some rows' lists hold; all else is 0 already."""
    lines, rows, columns, width = sizes
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    count = tl.load(counts_ptr + line, mask=line < lines, other=0)
    row_ptrs = mask_ptr + (line // rows).to(tl.int64) * rows * columns
    row_ptrs += (line % rows).to(tl.int64) * strides[0]
    list_ptrs = indices_ptr + line.to(tl.int64) * width
    for start in range(0, width, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        listed = entry[None, :] < count[:, None]
        index = tl.load(list_ptrs[:, None] + entry[None, :], mask=listed, other=0)
        tl.store(
            row_ptrs[:, None] + index.to(tl.int64) * strides[1],
            tl.full((LINES, ENTRIES), 1, tl.int8),
            mask=listed,
        )


def topk(given: TopK) -> Lists:
    """See ``tiled``."""
    scores, places = given.scores, given.places
    _, heads, rows, columns = scores.shape
    lists = _empty_lists(scores, given.width)
    if lists.counts.numel() == 0:
        return lists
    dtype, infinity, signless = _BITS[scores.dtype]
    padded = max(32, triton.next_power_of_2(columns))
    topk_kernel[(lists.counts.numel(),)](
        scores.view(dtype),
        places,
        *lists,
        (heads, rows, columns, given.width),
        (given.most, given.query_block, given.key_block, given.queries, given.num_sinks),
        scores.stride(),
        (0, 0, 0) if places is None else places.stride(),
        IS_CAUSAL=given.is_causal,
        FORCE_DIAGONAL=given.force_diagonal,
        INFINITY=infinity,
        SIGNLESS=signless,
        COLUMNS=padded,
        num_warps=max(1, padded // ROW_TILE),
    )
    return lists


def positions(given: Positions) -> Lists:
    """See ``tiled``."""
    mask, width = given
    _, heads, rows, columns = mask.shape
    lists = _empty_lists(mask, width)
    if lists.counts.numel():
        positions_kernel[(lists.counts.numel(),)](
            mask.view(torch.int8),
            *lists,
            (heads, rows, columns, width),
            mask.stride(),
            COLUMNS=min(ROW_TILE, max(32, triton.next_power_of_2(columns))),
            num_warps=1,
        )
    return lists


def dense(given: Dense) -> Mask:
    """See ``tiled``."""
    counts, indices, columns, is_transposed = given
    batch, heads, rows, width = indices.shape
    shape = (columns, rows) if is_transposed else (rows, columns)
    mask = torch.zeros(batch, heads, *shape, dtype=torch.bool, device=counts.device)
    if indices.numel():
        lines, entries = ENTRY_TILE
        mark_kernel[(triton.cdiv(counts.numel(), lines),)](
            counts,
            indices,
            mask.view(torch.int8),
            (counts.numel(), rows, columns, width),
            (1, rows) if is_transposed else (columns, 1),
            LINES=lines,
            ENTRIES=entries,
        )
    return Mask(mask)


def _empty_lists(tensor: Tensor, width: int) -> Lists:
    shape = tensor.shape[:3]
    return Lists(
        tensor.new_empty(shape, dtype=torch.int32),
        tensor.new_empty(*shape, width, dtype=torch.int32),
    )
