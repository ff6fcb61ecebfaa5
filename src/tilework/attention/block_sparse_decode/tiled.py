"""Block-sparse decoding in plain PyTorch: the selected tokens are gathered a tile at a time."""

import torch
from torch import Tensor

from tilework._operators import computation_dtype
from tilework.attention._tensors import scale_of
from tilework.attention.block_sparse_decode.common import Decoded, Decoding, empty_results

# Of keys and values at a time, and of scores: 4 MiB in float32, which stay in a CPU's cache.
ELEMENTS = 2**20
PLACES = 256  # of a list at a time, before sequences are computed one after another


def forward(given: Decoding) -> Decoded:
    """See ``reference``."""
    batch, heads, length, features = given.query.shape
    _, kv_heads, num_values = given.value_cache.shape[1:]
    results = empty_results(given)
    per_place = kv_heads * max(features + num_values, heads // kv_heads * length)
    together = max(1, ELEMENTS // max(1, PLACES * per_place))
    for first in range(0, batch, together):
        some = slice(first, first + together)
        pages = some if given.block_table is None else slice(None)
        part = given._replace(
            query=given.query[some],
            key_cache=given.key_cache[pages],
            value_cache=given.value_cache[pages],
            block_table=_part(given.block_table, some),
            seq_lengths=_part(given.seq_lengths, some),
            kv_indices=_part(given.kv_indices, some),
            kv_num_blocks=_part(given.kv_num_blocks, some),
        )
        results.output[some], results.lse[some] = _some_sequences(part)
    return results


def _part(tensor: Tensor | None, some: slice) -> Tensor | None:
    return None if tensor is None else tensor[some]


def _some_sequences(given: Decoding) -> Decoded:
    query, key_cache, value_cache = given.query, given.key_cache, given.value_cache
    block_table, seq_lengths = given.block_table, given.seq_lengths
    kv_indices, kv_num_blocks, block_size = given.kv_indices, given.kv_num_blocks, given.block_size
    dtype = computation_dtype(query.dtype)
    batch, heads, length, features = query.shape
    page_size, kv_heads, num_values = value_cache.shape[1:]
    # The tokens of the query heads of a group are rows: they share their keys.
    group = heads // kv_heads
    queries = query.to(dtype).reshape(batch, kv_heads, group * length, features) * scale_of(given)

    # Places are numbered through the selected blocks of a list, or through the sequence.
    lengths = query.new_full((batch,), page_size, dtype=torch.int64)
    lengths = (lengths if seq_lengths is None else seq_lengths.long())[:, None, None]
    if kv_indices is None:
        totals, most = lengths, page_size * (1 if block_table is None else block_table.shape[1])
    elif kv_num_blocks is None:
        most = kv_indices.shape[2] * block_size
        totals = lengths.new_full((1, 1, 1), most)
    else:
        most = kv_indices.shape[2] * block_size
        totals = kv_num_blocks.long()[..., None] * block_size
    if query.device.type == "cpu":
        most = min(most, int(totals.max())) if totals.numel() else 0  # a GPU's host would wait

    position = lengths - length + torch.arange(length, device=query.device)[:, None]
    row = torch.arange(batch, device=query.device)[:, None, None]
    head = torch.arange(kv_heads, device=query.device)[:, None]
    shape = queries.shape[:3]
    peak, total = queries.new_full(shape, -torch.inf), queries.new_zeros(shape)
    result = queries.new_zeros(*shape, num_values)
    per_place = batch * kv_heads * max(features + num_values, group * length)
    step = max(1, ELEMENTS // max(1, per_place))
    for start in range(0, most if key_cache.numel() + value_cache.numel() else 0, step):
        places = torch.arange(start, min(start + step, most), device=query.device)
        selected = places < totals
        tokens = places
        if kv_indices is not None:
            listed = kv_indices[:, :, places // block_size].long()
            tokens = listed * block_size + places % block_size
        selected = selected & (tokens < lengths)
        tokens = tokens.where(selected, 0)
        pages = row
        if block_table is not None:
            pages = block_table[row, tokens // page_size].where(selected, 0).long()
        keys, values = (
            _rows(cache, pages, tokens % page_size, head).to(dtype)
            for cache in (key_cache, value_cache)
        )
        if query.device.type != "cpu" or not selected.all():  # a GPU's host would wait
            keys, values = (one.masked_fill(~selected[..., None], 0) for one in (keys, values))
        seen = selected[:, :, None] & (tokens[:, :, None] <= position[:, None])
        scores = queries @ keys.mT
        by_token = scores.view(batch, kv_heads, group, length, len(places))
        by_token.masked_fill_(~seen[:, :, None], -torch.inf)
        new_peak = torch.maximum(peak, scores.amax(-1))
        # A query that has seen nothing has no finite peak to subtract.
        base = new_peak.where(new_peak != -torch.inf, 0)
        weights = scores.sub_(base[..., None]).exp_()
        decay = (peak - base).exp()
        total = total * decay + weights.sum(-1)
        # What a single token does not see is 0 already.
        mixed = weights @ values if length == 1 else _weighted_sum(weights, values, seen)
        result = result * decay[..., None] + mixed
        peak = new_peak
    output = result / total.where(total != 0, 1)[..., None]
    lse = peak + total.log()
    return Decoded(
        output.to(query.dtype).reshape(batch, heads, length, num_values),
        lse.reshape(batch, heads, length),
    )


def _rows(cache: Tensor, pages: Tensor, slots: Tensor, head: Tensor) -> Tensor:
    """``cache[pages, slots, head]``, which is slower."""
    *strides, dense = cache.stride()
    features = cache.shape[3]
    if cache.numel() == 0 or dense != 1 or any(stride % features for stride in strides):
        return cache[pages, slots, head]
    *strides, _ = (stride // features for stride in cache.stride())
    last = sum((size - 1) * stride for size, stride in zip(cache.shape[:3], strides, strict=True))
    places = pages * strides[0] + slots * strides[1] + head * strides[2]
    rows = cache.as_strided((last + 1, features), (features, 1))
    return rows.index_select(0, places.flatten()).view(*places.shape, features)


def _weighted_sum(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """``weights @ values``, but 0 times nan or infinity is 0 where a token does not see it."""
    tokens = seen.shape[2]
    finite = values.isfinite()
    if values.device.type == "cpu" and finite.all():  # a GPU's host would wait
        return weights @ values
    result = weights @ values.where(finite, 0)
    for bound in (torch.inf, -torch.inf):
        beyond = values.isnan() | (values == bound)
        meets = seen.to(values.dtype) @ beyond.to(values.dtype) > 0
        result += torch.where(meets, bound, 0.0).repeat(1, 1, weights.shape[2] // tokens, 1)
    return result
