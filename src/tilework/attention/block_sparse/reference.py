"""Block-sparse attention by its definition. All scores are stored."""

import torch
from torch import Tensor

from tilework._operators import computation_dtype, without_autocast


@without_autocast
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_num_blocks: Tensor | None,
    q_indices: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    block_size: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output, in the query's dtype, and the log-sum-exp of each row.

    ``kv_indices[b, h, i, :kv_num_blocks[b, h, i]]`` are the blocks of keys that block ``i`` of
    queries sees, in increasing order; ``q_num_blocks`` and ``q_indices`` are the transposed lists,
    for implementations that need them. Sizes of 1 for batch and heads stand for all; as many heads
    as keys have are those of each group of query heads. With ``query_starts`` and ``key_starts``,
    sequence ``s`` is the slice of positions from entry ``s`` to the next, the only element of the
    batch holds all of them, and the batch of the lists is that of sequences.
    """
    dtype = computation_dtype(query.dtype)
    visible = _visible(
        query, key, kv_num_blocks, kv_indices, query_starts, key_starts, block_size, is_causal
    )
    group = query.shape[1] // max(1, key.shape[1])
    keys, values = (tensor.to(dtype).repeat_interleave(group, 1) for tensor in (key, value))
    scores = scale * (query.to(dtype) @ keys.transpose(-2, -1))
    blind = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(blind, 0)
    weights = scores.softmax(-1).masked_fill(~visible, 0)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.sum(-1)
    return (weights @ values).to(query.dtype), lse.masked_fill(blind[..., 0], -torch.inf)


def _visible(
    query: Tensor,
    key: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    block_size: list[int],
    is_causal: bool,
) -> Tensor:
    """Which keys each query sees: bool of shape (batch or 1, heads or 1, queries, keys)."""
    rows, row_sequence = _positions(query, query_starts)
    columns, column_sequence = _positions(key, key_starts)
    # The longest sequence is not known here: lists that fit have no block beyond these.
    blocks = -(-key.shape[2] // block_size[1])
    listed = torch.arange(kv_indices.shape[-1], device=key.device) < kv_num_blocks[..., None]
    # What is not listed goes to a column that is cut off.
    places = kv_indices.where(listed & (kv_indices < blocks), blocks).long()
    active = torch.zeros(*places.shape[:-1], blocks + 1, dtype=torch.bool, device=key.device)
    active = active.scatter(-1, places, True)
    heads = active.shape[1]
    if heads not in (1, query.shape[1]):
        active = active.repeat_interleave(query.shape[1] // heads, 1)
    row_block, column_block = rows // block_size[0], columns // block_size[1]
    if query_starts is None:
        visible = active[:, :, row_block][..., column_block]
    else:
        sequence = row_sequence if len(active) > 1 else torch.zeros_like(row_sequence)
        visible = active[sequence, :, row_block].movedim(0, 1)[None][..., column_block]
        visible = visible & (row_sequence[:, None] == column_sequence)
    return visible & (columns <= rows[:, None]) if is_causal else visible


def _positions(tensor: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The position of each row in its sequence, and that sequence."""
    place = torch.arange(tensor.shape[2], device=tensor.device)
    if starts is None:
        return place, torch.zeros_like(place)
    sequence = torch.searchsorted(starts[1:].contiguous(), place.to(starts.dtype), right=True)
    return place - starts[sequence].long(), sequence
