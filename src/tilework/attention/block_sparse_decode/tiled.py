"""Block-sparse decoding in plain PyTorch: the selected tokens are gathered a tile at a time."""

import torch
from torch import Tensor

from tilework._operators import computation_dtype

ELEMENTS = 2**20  # of keys and values at a time: 4 MiB in float32, which stay in a CPU's cache


def forward(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor | None,
    seq_lengths: Tensor | None,
    kv_indices: Tensor | None,
    kv_num_blocks: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See ``reference.block_sparse_decode``."""
    dtype = computation_dtype(query.dtype)
    batch, heads, _, features = query.shape
    page_size, kv_heads = key_cache.shape[1:3]
    num_values = value_cache.shape[3]
    queries = query.to(dtype).reshape(batch, kv_heads, heads // kv_heads, features) * scale

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

    row = torch.arange(batch, device=query.device)[:, None, None]
    head = torch.arange(kv_heads, device=query.device)[:, None]
    shape = queries.shape[:3]
    peak, total = queries.new_full(shape, -torch.inf), queries.new_zeros(shape)
    result = queries.new_zeros(*shape, num_values)
    step = max(1, ELEMENTS // max(1, batch * kv_heads * (features + num_values)))
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
            cache[pages, tokens % page_size, head].to(dtype).masked_fill_(~selected[..., None], 0)
            for cache in (key_cache, value_cache)
        )
        scores = (queries @ keys.mT).masked_fill_(~selected[:, :, None], -torch.inf)
        new_peak = torch.maximum(peak, scores.amax(-1))
        # A query that has seen nothing has no finite peak to subtract.
        base = new_peak.where(new_peak != -torch.inf, 0)
        weights = scores.sub_(base[..., None]).exp_()
        decay = (peak - base).exp()
        total = total * decay + weights.sum(-1)
        result = result * decay[..., None] + weights @ values
        peak = new_peak
    output = result / total.where(total != 0, 1)[..., None]
    lse = peak + total.log()
    return output.to(query.dtype).reshape(batch, heads, 1, num_values), lse.reshape(batch, heads, 1)
