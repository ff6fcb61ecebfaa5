"""A layout from and as FlexAttention's BlockMask."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tilework import _checks
from tilework.attention.block_layout.common import Grid, Lists, count_up_to


def parts(function: str, block_mask: BlockMask, partial: str) -> list[Lists]:
    """The lists of the partial and of the full blocks, of four dimensions and in any order."""
    if not isinstance(block_mask, BlockMask):
        raise _checks.bad_type(function, "block_mask", "a BlockMask", block_mask)
    _checks.one_of(function, "partial", partial, ("error", "keep"))
    if partial == "error" and block_mask.kv_num_blocks.any():
        raise ValueError(
            f"{function}: block_mask must have no partial blocks with partial='error', got "
            f"{int(block_mask.kv_num_blocks.sum())}"
        )
    found = [(block_mask.kv_num_blocks, block_mask.kv_indices)]
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        found.append((block_mask.full_kv_num_blocks, block_mask.full_kv_indices))
    missing = (None,) * (4 - block_mask.kv_indices.dim())
    return [Lists(counts[missing], indices[missing]) for counts, indices in found]


def block_mask(
    dense: Tensor, counts: Tensor, indices: Tensor, grid: Grid, *, is_causal: bool, group: int
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
        full = count_up_to(last_full, counts, indices)
        last_diagonal = grid.diagonal(dense.device)[1]
        live = count_up_to(last_diagonal[:, None], counts, indices)
    width = indices.shape[-1]
    place = torch.arange(grid.columns, device=dense.device)
    padded = F.pad(indices, (0, 1))  # what is no block reads this 0

    def part(start: Tensor, stop: Tensor) -> Lists:
        shifted = start[..., None] + place
        listed = padded.gather(-1, shifted.where(shifted < stop[..., None], width))
        counts = (stop - start).repeat_interleave(group, 1)
        return Lists(counts, listed.repeat_interleave(group, 1))

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
