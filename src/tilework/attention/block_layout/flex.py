"""A layout as FlexAttention's BlockMask."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tilework.attention.block_layout import lists
from tilework.attention.block_layout.grid import Grid


def block_mask(
    dense: Tensor, indices: Tensor, counts: Tensor, grid: Grid, *, is_causal: bool, group: int
) -> BlockMask:
    """The full blocks, those that ``is_causal`` cuts through, and both as ``mask_mod``.

    ``dense`` and the row lists describe the same layout; ``group`` query heads share a head of it.
    """
    batch, heads = dense.shape[:2]
    bq, bk = grid.block_size
    full = live = counts
    if is_causal:
        # In a row, full blocks stand first, then partial ones, then those that are not live.
        first_query = torch.arange(grid.rows, device=dense.device)[:, None] * bq
        last_full = (first_query + 1) // bk - 1
        every_key = first_query >= grid.lengths[1] - 1
        last_full = last_full.masked_fill(every_key, grid.columns - 1)
        full = lists.count_up_to(last_full, indices, counts)
        last_diagonal = grid.diagonal(dense.device)[1]
        live = lists.count_up_to(last_diagonal[:, None], indices, counts)
    width = indices.shape[-1]
    place = torch.arange(grid.columns, device=dense.device)
    padded = F.pad(indices, (0, 1))  # what is no block reads this 0

    def part(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        shifted = start[..., None] + place
        listed = padded.gather(-1, shifted.where(shifted < stop[..., None], width))
        return (stop - start).repeat_interleave(group, 1), listed.repeat_interleave(group, 1)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        b = b if batch > 1 else torch.zeros_like(b)
        h = h // group if heads > 1 else torch.zeros_like(h)
        active = dense[b, h, q_idx // bq, kv_idx // bk]
        return active & (kv_idx <= q_idx) if is_causal else active

    partial_counts, partial_indices = part(full, live)
    full_counts, full_indices = part(torch.zeros_like(full), full)
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=grid.block_size,
        mask_mod=mask_mod,
        seq_lengths=grid.lengths,
    )
