"""Block-sparse decoding on the GPU: kernels, tile sizes and launchers.

A program takes rows, which are the query tokens of a group of heads and share keys, and a part of
the places of their list: the tokens of the selected blocks, numbered through. Parts are merged in
order by a second kernel. There are no locks and no atomics.

The first kernel takes ``tensors``, query and caches, with their ``strides``; ``lists``, the block
table, lengths, indices and counts, each of them or None, with ``list_strides``; ``sizes``: heads,
heads of a group, queries, features, values, page size, width of lists and block size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilework import _triton
from tilework._triton import Tuned
from tilework.attention._kernels import LOG2_E, MAX_FEATURES, Tile
from tilework.attention._tensors import scale_of
from tilework.attention.block_sparse_decode.common import Decoded, Decoding, empty_results

_WIDE, _SMALL = Tile(32, 64, 4, 3), Tile(16, 16, 4, 1)
# Up to so many features, for one query token and for several: tiles that do not spill registers.
ONE = Tuned(
    {
        "sm_80": {128: _WIDE, 256: Tile(32, 32, 4, 2)},
        "sm_90": {128: _WIDE, 256: Tile(32, 64, 8, 2)},
        "sm_100": {128: _WIDE, 256: Tile(32, 64, 8, 2)},
        "gfx942": {128: Tile(32, 64, 4, 2), 256: Tile(32, 32, 8, 2)},
        "float32": {64: Tile(16, 32, 4, 2), 128: Tile(16, 16, 8, 1), 256: _SMALL},
    },
    otherwise="sm_80",
)
SEVERAL = ONE | {"float32": {64: _SMALL, 256: Tile(16, 16, 8, 1)}}


def refusal(features: int, values: int) -> str | None:
    """Why the kernels do not take these sizes, if they do not."""
    if not 0 < max(features, values) <= MAX_FEATURES:
        return f"it takes 1 to {MAX_FEATURES} features, got {features} and {values}"
    return None


@triton.jit
def split_kernel(
    tensors,
    lists,
    output_ptr,
    lse_ptr,
    sizes,
    strides,
    list_strides,
    scale,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    SEVERAL: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Output and log-sum-exp of up to ``ROWS`` rows of a group over a part of their places.

    A row has a peak ``m``, a sum ``l`` of weights and one ``o`` of weighted values, from -inf, 0
    and 0. Each tile of places, in their order, with scores ``s_t`` to the base of 2, makes

        m' = max(m, max_t s_t),  w_t = 2^(s_t - m'),  d = 2^(m - m'),
        l' = d l + sum_t w_t,    o' = d o + sum_t w_t v_t

    of them. At the end the output is ``o / l``, and the log-sum-exp ``(m + log2 l) / log2 e``.
    """
    query_ptr, key_ptr, value_ptr = tensors
    table_ptr, lengths_ptr, indices_ptr, counts_ptr = lists
    heads, group, num_queries, num_features, num_values, page_size, width, block_size = sizes
    query_strides, key_strides, value_strides = strides
    table_strides, lengths_strides, indices_strides, counts_strides = list_strides
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    group_rows = group * num_queries
    tiles_of_group = tl.cdiv(group_rows, ROWS)
    kv_heads = heads // group
    kv_head = tl.program_id(0) // tiles_of_group % kv_heads
    batch = (tl.program_id(0) // tiles_of_group // kv_heads).to(tl.int64)
    row = tl.program_id(0) % tiles_of_group * ROWS + tl.arange(0, ROWS)
    valid = row < group_rows
    head = (kv_head * group + row // num_queries).to(tl.int64)
    query_token = row % num_queries
    features = tl.arange(0, FEATURES).to(tl.int64)
    values = tl.arange(0, VALUES).to(tl.int64)
    some_features = (features < num_features)[None, :]
    some_values = (values < num_values)[None, :]
    query_rows = (
        batch * query_strides[0]
        + head * query_strides[1]
        + query_token.to(tl.int64) * query_strides[2]
    )
    queries = tl.load(
        query_ptr + query_rows[:, None] + features[None, :] * query_strides[3],
        mask=valid[:, None] & some_features,
        other=0.0,
    )
    key_ptr += kv_head.to(tl.int64) * key_strides[2]
    value_ptr += kv_head.to(tl.int64) * value_strides[2]

    # Without lengths a page is full, without lists all tokens are selected.
    length = page_size
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + batch * lengths_strides[0]).to(tl.int32)
    position = length - num_queries + query_token
    places = length
    if indices_ptr is not None:
        indices_ptr += batch * indices_strides[0] + kv_head * indices_strides[1]
        count = width
        if counts_ptr is not None:
            counts_ptr += batch * counts_strides[0] + kv_head * counts_strides[1]
            count = tl.load(counts_ptr).to(tl.int32)
        places = count * block_size
    if table_ptr is not None:
        table_ptr += batch * table_strides[0]
    # Parts are whole tiles, so that no place is in two.
    part = tl.cdiv(tl.cdiv(places, TILE_KEYS), splits) * TILE_KEYS
    first = split * part

    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, VALUES), tl.float32)
    for start in range(first, tl.minimum(first + part, places), TILE_KEYS):
        place = start + tl.arange(0, TILE_KEYS)
        selected = place < places
        token = place
        if indices_ptr is not None:
            entry = (place // block_size).to(tl.int64)
            block = tl.load(indices_ptr + entry * indices_strides[2], mask=selected, other=0)
            token = block.to(tl.int32) * block_size + place % block_size
            selected = selected & (token < length)
        page = batch
        if table_ptr is not None:
            entry = (token // page_size).to(tl.int64)
            page = tl.load(table_ptr + entry * table_strides[1], mask=selected, other=0)
            page = page.to(tl.int64)
        slot = (token % page_size).to(tl.int64)
        key_rows = page * key_strides[0] + slot * key_strides[1]
        keys = tl.load(
            key_ptr + key_rows[:, None] + features[None, :] * key_strides[3],
            mask=selected[:, None] & some_features,
            other=0.0,
        )
        scores = tl.zeros((ROWS, TILE_KEYS), tl.float32)
        scores = _triton.dot(queries, tl.trans(keys), scores, PRECISION, INTERPRETED)
        seen = selected[None, :]
        if SEVERAL:
            seen = tl.where(selected, token, length)[None, :] <= position[:, None]
        scores = tl.where(seen, scores * (scale * LOG2_E), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # A query that has seen nothing has no finite peak to subtract.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights, 1)
        peak = new_peak
        value_rows = page * value_strides[0] + slot * value_strides[1]
        chosen = tl.load(
            value_ptr + value_rows[:, None] + values[None, :] * value_strides[3],
            mask=selected[:, None] & some_values,
            other=0.0,
        )
        if SEVERAL:
            # 0 times nan is nan, also for rows before the token: those that see it become nan.
            finite = tl.abs(chosen) < float("inf")
            chosen = tl.where(finite, chosen, 0.0)
            spoiled = tl.min(tl.where(finite, length, token[:, None]))
            decay = tl.where(position < spoiled, decay, float("nan"))
        result = _triton.dot(
            weights.to(chosen.dtype), chosen, result * decay[:, None], PRECISION, INTERPRETED
        )
    divisor = tl.where(total == 0, 1.0, total)
    result /= divisor[:, None]
    rows = ((batch * heads + head) * num_queries + query_token) * splits + split
    tl.store(
        output_ptr + rows[:, None] * num_values + values[None, :],
        result.to(output_ptr.dtype.element_ty),
        mask=valid[:, None] & some_values,
    )
    tl.store(lse_ptr + rows, (peak + tl.log2(divisor)) / LOG2_E, mask=valid)


@triton.jit
def merge_kernel(
    part_ptr, part_lse_ptr, output_ptr, lse_ptr, splits, num_values, VALUES: tl.constexpr
):
    """Output and log-sum-exp of a query from those of its parts, in their order."""
    row = tl.program_id(0).to(tl.int64)
    values = tl.arange(0, VALUES)
    peak = tl.load(part_lse_ptr + row * splits)
    for split in range(1, splits):
        peak = tl.maximum(peak, tl.load(part_lse_ptr + row * splits + split))
    base = tl.where(peak == float("-inf"), 0.0, peak)
    total = 0.0
    result = tl.zeros((VALUES,), tl.float32)
    for split in range(splits):
        weight = tl.exp(tl.load(part_lse_ptr + row * splits + split) - base)
        total += weight
        part = tl.load(
            part_ptr + (row * splits + split) * num_values + values,
            mask=values < num_values,
            other=0.0,
        )
        result += weight * part
    divisor = tl.where(total == 0, 1.0, total)
    result /= divisor
    tl.store(
        output_ptr + row * num_values + values,
        result.to(output_ptr.dtype.element_ty),
        mask=values < num_values,
    )
    tl.store(lse_ptr + row, peak + tl.log(divisor))


def forward(given: Decoding) -> Decoded:
    """See ``reference``."""
    query, block_table, kv_indices = given.query, given.block_table, given.kv_indices
    batch, heads, length, num_features = query.shape
    page_size, kv_heads, num_values = given.value_cache.shape[1:]
    output, lse = results = empty_results(given)
    if lse.numel() == 0:
        return results
    features, values = (max(16, triton.next_power_of_2(n)) for n in (num_features, num_values))
    group = heads // kv_heads
    arch = _triton.architecture(query.device)
    table = SEVERAL if length > 1 else ONE
    most_rows, tile_keys, warps, stages = table.choose(arch, query.dtype, max(features, values))
    rows = min(most_rows, max(16, triton.next_power_of_2(group * length)))

    most = page_size * (1 if block_table is None else block_table.shape[1])
    if kv_indices is not None:
        most = min(most, kv_indices.shape[2] * given.block_size)
    programs = batch * kv_heads * triton.cdiv(group * length, rows)
    splits = count_splits(programs, triton.cdiv(most, tile_keys), query.device)
    parts, part_lse = output, lse
    if splits > 1:
        parts = query.new_empty(*lse.shape, splits, num_values, dtype=torch.float32)
        part_lse = query.new_empty(*lse.shape, splits, dtype=torch.float32)
    constants: dict[str, Any] = {
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "INTERPRETED": _triton.INTERPRETED,
        "SEVERAL": length > 1,
        "ROWS": rows,
        "TILE_KEYS": tile_keys,
        "FEATURES": features,
        "VALUES": values,
        "num_warps": 1 if _triton.INTERPRETED else warps,
        "num_stages": stages,
    }
    split_kernel[programs, splits](
        (query, given.key_cache, given.value_cache),
        (block_table, given.seq_lengths, kv_indices, given.kv_num_blocks),
        parts,
        part_lse,
        (
            heads,
            group,
            length,
            num_features,
            num_values,
            page_size,
            0 if kv_indices is None else kv_indices.shape[2],
            given.block_size,
        ),
        (query.stride(), given.key_cache.stride(), given.value_cache.stride()),
        (
            _strides(block_table, 2),
            _strides(given.seq_lengths, 1),
            _strides(kv_indices, 3),
            _strides(given.kv_num_blocks, 2),
        ),
        scale_of(given),
        **constants,
    )
    if splits > 1:
        merge_kernel[(lse.numel(),)](
            parts, part_lse, output, lse, splits, num_values, VALUES=values, num_warps=1
        )
    return results


def count_splits(programs: int, tiles: int, device: torch.device) -> int:
    """Into how many parts the places are split: enough to fill the GPU twice, by sizes alone."""
    wanted = -(-2 * _triton.multiprocessors(device) // programs)
    return max(1, min(tiles, wanted))


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    """The strides of a list, 0 along heads that share it."""
    if tensor is None:
        return (0,) * dims
    return tuple(
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
