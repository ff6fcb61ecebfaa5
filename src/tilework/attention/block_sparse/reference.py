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
    block_size: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output, in the query's dtype, and the log-sum-exp of each row.

    ``kv_indices[b, h, i, :kv_num_blocks[b, h, i]]`` are the blocks of keys that block ``i`` of
    queries sees, in increasing order; ``q_num_blocks`` and ``q_indices`` are the transposed lists,
    for implementations that need them. Sizes of 1 for batch and heads stand for all; as many heads
    as keys have are those of each group of query heads.
    """
    dtype = computation_dtype(query.dtype)
    visible = _visible(query, key, kv_num_blocks, kv_indices, block_size, is_causal)
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
    block_size: list[int],
    is_causal: bool,
) -> Tensor:
    """Which keys each query sees: bool of shape (batch or 1, heads or 1, queries, keys)."""
    rows, columns = query.shape[2], key.shape[2]
    blocks = -(-columns // block_size[1])
    listed = torch.arange(kv_indices.shape[-1], device=key.device) < kv_num_blocks[..., None]
    # What is not listed goes to a column that is cut off.
    places = kv_indices.where(listed, blocks).long()
    active = torch.zeros(*places.shape[:-1], blocks + 1, dtype=torch.bool, device=key.device)
    active = active.scatter(-1, places, True)[..., :blocks]
    heads = active.shape[1]
    if heads not in (1, query.shape[1]):
        active = active.repeat_interleave(query.shape[1] // heads, 1)
    visible = active.repeat_interleave(block_size[0], 2).repeat_interleave(block_size[1], 3)
    visible = visible[:, :, :rows, :columns]
    if is_causal:
        visible = visible & torch.ones(rows, columns, dtype=torch.bool, device=key.device).tril()
    return visible
