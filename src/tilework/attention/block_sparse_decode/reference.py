"""Block-sparse decoding by its definition: a mask over the sequence of each row of the batch."""

import torch
from torch import Tensor

from tilework._operators import computation_dtype
from tilework.attention._tensors import scale_of
from tilework.attention.block_sparse_decode.common import Decoded, Decoding


def forward(given: Decoding) -> Decoded:
    """Return the output and the log-sum-exp."""
    query, seq_lengths = given.query, given.seq_lengths
    dtype = computation_dtype(query.dtype)
    batch, heads, length, features = query.shape
    kv_heads = given.key_cache.shape[2]
    keys, values = (
        _sequences(cache, given.block_table, seq_lengths)
        for cache in (given.key_cache, given.value_cache)
    )
    token = torch.arange(keys.shape[2], device=query.device)
    end = token.shape[0] if seq_lengths is None else seq_lengths.long()[:, None, None, None]
    position = end - length + torch.arange(length, device=query.device)[:, None]
    selected = (token <= position).expand(batch, kv_heads, length, token.shape[0])
    if given.kv_indices is not None:
        blocks = token // given.block_size
        selected = selected & _listed(blocks, given.kv_indices, given.kv_num_blocks)
    # What is not selected may hold nan, so that each query token has keys and values of its own.
    keys, values = (
        tensor.to(dtype)[:, :, None].masked_fill(~selected[..., None], 0)
        for tensor in (keys, values)
    )
    grouped = query.to(dtype).reshape(batch, kv_heads, heads // kv_heads, length, features)
    scores = scale_of(given) * (grouped.transpose(2, 3) @ keys.mT)
    blind = ~selected.any(-1)[..., None, None]
    scores = scores.masked_fill(~selected[:, :, :, None], -torch.inf).masked_fill(blind, 0)
    weights = scores.softmax(-1).masked_fill(~selected[:, :, :, None], 0)
    lse = scores.logsumexp(-1) if token.shape[0] else scores.sum(-1)
    lse = lse.masked_fill(blind[..., 0], -torch.inf)
    output = (weights @ values).to(query.dtype).transpose(2, 3)
    return Decoded(
        output.reshape(batch, heads, length, values.shape[-1]),
        lse.transpose(2, 3).reshape(batch, heads, length),
    )


def _sequences(cache: Tensor, block_table: Tensor | None, seq_lengths: Tensor | None) -> Tensor:
    """The tokens of each sequence, ``(B, Hkv, S, E)``; anything after its end."""
    if block_table is None or seq_lengths is None:
        return cache.transpose(1, 2)
    page_size = cache.shape[1]
    pages = torch.arange(block_table.shape[1] if cache.shape[0] else 0, device=cache.device)
    used = pages * page_size < seq_lengths[:, None]
    table = block_table[:, : pages.shape[0]].where(used, 0).long()
    return cache[table].flatten(1, 2).transpose(1, 2)


def _listed(blocks: Tensor, kv_indices: Tensor, kv_num_blocks: Tensor | None) -> Tensor:
    """Which of the blocks of the tokens are in the lists: ``(B, Hkv or 1, T or 1, S)``."""
    equal = kv_indices[..., None] == blocks
    if kv_num_blocks is not None:
        place = torch.arange(kv_indices.shape[-1], device=blocks.device)
        equal = equal & (place < kv_num_blocks[..., None])[..., None]
    listed = equal.any(-2)
    return listed if kv_indices.dim() == 4 else listed[:, :, None]
