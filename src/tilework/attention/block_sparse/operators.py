"""The operator of block-sparse attention and how it differentiates."""

from typing import Any

import torch
from torch import Tensor

from tilework import _checks, _operators
from tilework.attention._tensors import scale_of
from tilework.attention.block_sparse import reference
from tilework.attention.block_sparse.common import (
    Attended,
    Attention,
    empty_gradient,
    empty_results,
    operations,
)


def refusal(block_size: tuple[int, int], features: int, values: int) -> str | None:
    """Why the kernels do not take these sizes, if they do not."""
    from tilework.attention.block_sparse import triton

    reason: str | None = triton.refusal(block_size, features, values)
    return reason


def _empty_gradient(given: Any, leaf: Tensor) -> Tensor:
    return empty_gradient(leaf, given.query_starts is not None)


def of_active_blocks(given: Attention) -> Attended:
    """See ``reference``, of which it stores the scores of the active blocks alone.

    Each active block of each query head is computed by itself, in operations of which autograd
    knows all derivatives; what belongs to one query is added up by index.
    """
    dtype = _operators.computation_dtype(given.query.dtype)
    query, key, value = (
        tensor.to(dtype).transpose(0, 1).flatten(1, 2)
        for tensor in (given.query, given.key, given.value)
    )
    (heads, queries, _), (kv_heads, keys, _) = query.shape, key.shape
    starts, lengths = _sequences(given.query, given.query_starts)
    key_starts, key_lengths = _sequences(given.key, given.key_starts)
    device = query.device

    def of_heads(lists: Tensor) -> Tensor:
        lists = lists.expand(lengths.shape[0], *lists.shape[1:])
        return lists.repeat_interleave(heads // max(1, lists.shape[1]), 1)

    counts, indices = of_heads(given.kv_num_blocks), of_heads(given.kv_indices).long()
    height, width = given.block_size
    listed = torch.arange(indices.shape[3], device=device) < counts[..., None]
    listed &= indices * width < key_lengths[:, None, None, None]
    listed &= (torch.arange(indices.shape[2], device=device) * height < lengths[:, None])[
        :, None, :, None
    ]
    if _checks.has_values(listed):
        block = listed.flatten().nonzero()[:, 0]
    else:
        block = torch.arange(listed.numel(), device=device)
    sequence, head, row, _ = place = torch.unravel_index(block, listed.shape)
    position = row[:, None] * height + torch.arange(height, device=device)
    column = indices[place][:, None] * width + torch.arange(width, device=device)
    valid = (position < lengths[sequence][:, None]) & listed[place][:, None]
    present = column < key_lengths[sequence][:, None]
    visible = valid[:, :, None] & present[:, None]
    if given.is_causal:
        visible = visible & (column[:, None] <= position[:, :, None])
    of_query = (head * queries + starts[sequence])[:, None] + position
    of_key = (head // (heads // max(1, kv_heads)) * keys + key_starts[sequence])[:, None] + column
    of_key = of_key.where(present, 0)

    rows = query.flatten(0, 1)[of_query.where(valid, 0)]
    scores = scale_of(given) * (rows @ key.flatten(0, 1)[of_key].mT)
    scores = scores.masked_fill(~visible, -torch.inf)
    nobody = heads * queries  # takes what belongs to no query
    of_query = of_query.where(valid, nobody)
    peak = scores.new_full((nobody + 1,), -torch.inf)
    peak = peak.scatter_reduce(0, of_query.flatten(), scores.detach().amax(2).flatten(), "amax")
    peak = peak.masked_fill(peak == -torch.inf, 0)
    weights = (scores - peak[of_query][..., None]).exp()

    def added(parts: Tensor) -> Tensor:
        zeros = parts.new_zeros(nobody + 1, *parts.shape[2:])
        return zeros.index_put((of_query,), parts, accumulate=True)[:nobody]

    total = added(weights.sum(2))
    blind = total == 0
    total = total.masked_fill(blind, 1)
    output = added(weights @ value.flatten(0, 1)[of_key]) / total[:, None]
    lse = (peak[:nobody] + total.log()).masked_fill(blind, -torch.inf)
    batch, _, length, _ = given.query.shape
    output, lse = (
        found.reshape(heads, batch, length, *found.shape[1:]).transpose(0, 1)
        for found in (output.to(given.query.dtype), lse)
    )
    return Attended(output, lse)


def _sequences(tensor: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each sequence starts among the positions of all, and its length."""
    if starts is not None:
        return starts[:-1].long(), starts.diff().long()
    batch, _, length, _ = tensor.shape
    start = torch.arange(batch, device=tensor.device) * length
    return start, torch.full_like(start, length)


_LISTS = "kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices", "query_starts", "key_starts"
attention = _operators.define_pair(
    "block_sparse_attention",
    Attention,
    Attended,
    empty_results,
    reference=reference.forward,
    rooms=__package__,
    differentiable=("query", "key", "value"),
    saved=("query", "key", "value", "output", "lse", *_LISTS),
    empty_gradient=_empty_gradient,
    second_order=of_active_blocks,
    operations=operations,
    backward_operations=operations,
)
