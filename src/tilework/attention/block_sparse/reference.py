"""Block-sparse attention by its definition. All scores are stored."""

import torch
from torch import Tensor

from tilework._operators import computation_dtype
from tilework.attention._tensors import scale_of
from tilework.attention.block_sparse.common import Attended, Attention


def forward(given: Attention) -> Attended:
    """Return the output and the log-sum-exp of each row."""
    query, key, value = given.query, given.key, given.value
    dtype = computation_dtype(query.dtype)
    visible = _visible(given)
    group = query.shape[1] // max(1, key.shape[1])
    keys, values = (tensor.to(dtype).repeat_interleave(group, 1) for tensor in (key, value))
    scores = scale_of(given) * (query.to(dtype) @ keys.transpose(-2, -1))
    blind = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(blind, 0)
    weights = scores.softmax(-1).masked_fill(~visible, 0)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.sum(-1)
    return Attended((weights @ values).to(query.dtype), lse.masked_fill(blind[..., 0], -torch.inf))


def _visible(given: Attention) -> Tensor:
    """Which keys each query sees: bool of shape (batch or 1, heads or 1, queries, keys)."""
    query, key, block_size = given.query, given.key, given.block_size
    rows, row_sequence = _positions(query, given.query_starts)
    columns, column_sequence = _positions(key, given.key_starts)
    # The longest sequence is not known here: lists that fit have no block beyond these.
    blocks = -(-key.shape[2] // block_size[1])
    indices = given.kv_indices
    listed = torch.arange(indices.shape[-1], device=key.device) < given.kv_num_blocks[..., None]
    # What is not listed goes to a column that is cut off.
    places = indices.where(listed & (indices < blocks), blocks).long()
    active = torch.zeros(*places.shape[:-1], blocks + 1, dtype=torch.bool, device=key.device)
    active = active.scatter(-1, places, True)
    heads = active.shape[1]
    if heads not in (1, query.shape[1]):
        active = active.repeat_interleave(query.shape[1] // heads, 1)
    row_block, column_block = rows // block_size[0], columns // block_size[1]
    if given.query_starts is None:
        visible = active[:, :, row_block][..., column_block]
    else:
        sequence = row_sequence if active.shape[0] > 1 else torch.zeros_like(row_sequence)
        visible = active[sequence, :, row_block].movedim(0, 1)[None][..., column_block]
        visible = visible & (row_sequence[:, None] == column_sequence)
    return visible & (columns <= rows[:, None]) if given.is_causal else visible


def _positions(tensor: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The position of each row in its sequence, and that sequence."""
    place = torch.arange(tensor.shape[2], device=tensor.device)
    if starts is None:
        return place, torch.zeros_like(place)
    sequence = torch.searchsorted(starts[1:].contiguous(), place.to(starts.dtype), right=True)
    return place - starts[sequence].long(), sequence
