"""What a gradient filter leaves out: tiles of a panel whose gradients are small in every row.

A kernel chooses the tiles that count; the products are kernels that pass over the others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilework import _triton
from tilework._triton import Config
from tilework.losses._classes.kept import note
from tilework.losses._classes.kernels import precision
from tilework.losses._classes.tiles import accumulate

IGNORED = -1  # the target of ignored rows where classes are in an order of their own


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


def add_product(
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


def by_mean_logit(
    hidden: Tensor, ignored: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> Tensor:
    """Classes from small to large mean logits, before softcap; ignored rows are zeros."""
    mean = hidden.sum(0, dtype=torch.float32) / ignored.logical_not().sum()
    logits = linear_weight @ mean.to(hidden.dtype)
    if linear_bias is not None:
        logits = logits + linear_bias
    return logits.argsort(stable=True)


def places(target: Tensor, ignored: Tensor, order: Tensor) -> Tensor:
    """Where targets lie in an order of classes; beyond it for those that are no classes."""
    num_classes = len(order)
    place = torch.empty_like(order)
    place[order] = torch.arange(num_classes, device=order.device)
    inside = (target >= 0) & (target < num_classes)
    places = place[target.where(inside, 0)].where(inside, num_classes)
    return places.masked_fill(ignored, IGNORED)
