"""Block-sparse attention on the GPU: kernels, tile sizes and launchers.

A program takes a tile of queries, of several heads of a group where they share a list, and walks
the list of its block. Gradients of keys and values walk the transposed lists. There are no locks
and no atomics.

Packed sequences are the elements of a batch: each has its span of the rows. Results are contiguous
as ``(batch, heads, rows)`` or, packed, as ``(rows, heads)``.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilework import _triton
from tilework._triton import Tuned
from tilework.attention import _kernels
from tilework.attention._kernels import LOG2_E, MAX_FEATURES
from tilework.attention.block_sparse.results import empty_gradient, empty_results


class Tile(NamedTuple):
    """Queries (of all heads) and keys of a tile at most, and warps and stages of a program."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


_WIDE, _SQUARE, _LOW = Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(32, 32, 8, 2)
_SHALLOW, _SMALL = Tile(128, 64, 8, 2), Tile(16, 16, 4, 1)
# Up to so many features: the largest of those tried that do not spill registers. Products of
# float32 take many: with more than 64 features some spill.
TILES = {
    "forward": Tuned(
        {
            "sm_80": {32: _SHALLOW, 128: _WIDE, 256: _SQUARE},
            "sm_90": {128: _WIDE, 256: _SQUARE},
            "sm_100": {128: _WIDE, 256: _SQUARE},
            "gfx942": {128: Tile(64, 32, 4, 3), 256: Tile(64, 32, 4, 2)},
            "float32": {128: _LOW, 256: _SMALL},
        },
        otherwise="sm_80",
    ),
    "query": Tuned(
        {
            "sm_80": {64: _SHALLOW, 256: _SQUARE},
            "sm_90": {128: _SHALLOW, 256: Tile(32, 32, 4, 2)},
            "sm_100": {64: _SHALLOW, 256: _SQUARE},
            "gfx942": {64: _SHALLOW, 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 4, 2)},
            "float32": {64: _LOW, 256: _SMALL},
        },
        otherwise="sm_80",
    ),
    "key": Tuned(
        {
            "sm_80": {32: _SQUARE, 64: _LOW, 128: Tile(32, 64, 8, 2), 256: _SMALL},
            "sm_90": {64: _SQUARE, 128: Tile(32, 64, 8, 2), 256: _SMALL},
            "sm_100": {32: Tile(64, 64, 4, 2), 64: _SQUARE, 256: Tile(32, 64, 8, 2)},
            "gfx942": {128: _LOW, 256: Tile(32, 32, 4, 2)},
            "float32": {64: Tile(32, 16, 4, 1), 256: _SMALL},
        },
        otherwise="sm_80",
    ),
}


def refusal(block_size: tuple[int, int], features: int, values: int) -> str | None:
    """Why the kernels do not take these sizes, if they do not."""
    if any(size < 16 or size > 128 or size & (size - 1) for size in block_size):
        return f"blocks must be powers of 2 from 16 to 128, got {tuple(block_size)}"
    if not 0 < max(features, values) <= MAX_FEATURES:
        return f"it takes 1 to {MAX_FEATURES} features, got {features} and {values}"
    return None


@triton.jit
def _rows(first, num_queries, TILE_QUERIES: tl.constexpr, PACK: tl.constexpr):
    """Head within the pack, position, and validity of each row of a tile of queries."""
    row = tl.arange(0, PACK * TILE_QUERIES)
    position = first + row % TILE_QUERIES
    return row // TILE_QUERIES, position, position < num_queries


@triton.jit
def _span(starts_ptr, batch, length):
    """Where the rows of an element of the batch start, and how many there are."""
    start = 0
    if starts_ptr is not None:
        start = tl.load(starts_ptr + batch).to(tl.int64)
        length = (tl.load(starts_ptr + batch + 1) - start).to(tl.int32)
    return start, length


@triton.jit
def _results(batch, head, heads, start, positions, length, PACKED: tl.constexpr):
    """Where the results of positions lie, in rows."""
    if PACKED:
        return (start + positions) * heads + head
    else:
        return (batch * heads + head) * length + positions


@triton.jit
def forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    counts_ptr,
    indices_ptr,
    query_starts_ptr,
    key_starts_ptr,
    output_ptr,
    lse_ptr,
    heads,
    group,
    num_queries,
    num_keys,
    num_features,
    num_values,
    list_heads,
    list_stride_batch,
    list_rows,
    list_width,
    query_stride_batch,
    query_stride_head,
    query_stride_row,
    query_stride_feature,
    key_stride_batch,
    key_stride_head,
    key_stride_row,
    key_stride_feature,
    value_stride_batch,
    value_stride_head,
    value_stride_row,
    value_stride_feature,
    scale,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PACK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Output and log-sum-exp of a tile of queries, of ``PACK`` heads."""
    first = tl.program_id(0) * TILE_QUERIES
    first_head = tl.program_id(1).to(tl.int64) * PACK
    batch = tl.program_id(2).to(tl.int64)
    PACKED: tl.constexpr = query_starts_ptr is not None
    query_start, num_queries = _span(query_starts_ptr, batch, num_queries)
    key_start, num_keys = _span(key_starts_ptr, batch, num_keys)
    head, positions, valid = _rows(first, num_queries, TILE_QUERIES, PACK)
    features = tl.arange(0, FEATURES)
    values = tl.arange(0, VALUES)
    query_ptr += batch * query_stride_batch + query_start * query_stride_row
    query_rows = (first_head + head) * query_stride_head + positions.to(tl.int64) * query_stride_row
    queries = _kernels.tile(
        query_ptr, query_rows, valid, features, num_features, 1, query_stride_feature
    )
    kv_head = first_head // group
    key_ptr += batch * key_stride_batch + kv_head * key_stride_head + key_start * key_stride_row
    value_ptr += batch * value_stride_batch + kv_head * value_stride_head
    value_ptr += key_start * value_stride_row
    list_row = batch * list_stride_batch + first_head * list_heads // heads * list_rows
    list_row += first // QUERY_BLOCK
    count = tl.load(counts_ptr + list_row)
    if PACKED:
        count = tl.where(first < num_queries, count, 0)
    last = tl.minimum(first + TILE_QUERIES, num_queries) - 1

    peak = tl.full((PACK * TILE_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((PACK * TILE_QUERIES,), tl.float32)
    result = tl.zeros((PACK * TILE_QUERIES, VALUES), tl.float32)
    for place in range(count):
        block = tl.load(indices_ptr + list_row * list_width + place)
        width = KEY_BLOCK
        if PACKED:
            width = tl.minimum(KEY_BLOCK, num_keys - block * KEY_BLOCK)
        for start in range(0, width, TILE_KEYS):
            columns = block * KEY_BLOCK + start + tl.arange(0, TILE_KEYS)
            present = columns < num_keys
            if (not IS_CAUSAL) or block * KEY_BLOCK + start <= last:
                keys = _kernels.tile(
                    key_ptr,
                    columns,
                    present,
                    features,
                    num_features,
                    key_stride_row,
                    key_stride_feature,
                )
                scores = _kernels.scores(
                    queries,
                    keys,
                    positions,
                    columns,
                    num_keys,
                    scale * LOG2_E,
                    IS_CAUSAL,
                    PRECISION,
                    INTERPRETED,
                )
                new_peak = tl.maximum(peak, tl.max(scores, 1))
                # A query that has seen nothing has no finite peak to subtract.
                base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                weights = tl.exp2(scores - base[:, None])
                decay = tl.exp2(peak - base)
                total = total * decay + tl.sum(weights, 1)
                peak = new_peak
                chosen = _kernels.tile(
                    value_ptr,
                    columns,
                    present,
                    values,
                    num_values,
                    value_stride_row,
                    value_stride_feature,
                )
                result = _triton.dot(
                    weights.to(chosen.dtype),
                    chosen,
                    result * decay[:, None],
                    PRECISION,
                    INTERPRETED,
                )
    result /= tl.where(total == 0, 1.0, total)[:, None]
    output_rows = _results(
        batch, first_head + head, heads, query_start, positions, num_queries, PACKED
    )
    output_offsets = output_rows[:, None] * num_values + values[None, :]
    tl.store(
        output_ptr + output_offsets,
        result.to(output_ptr.dtype.element_ty),
        mask=valid[:, None] & (values < num_values)[None, :],
    )
    lse = tl.where(total == 0, float("-inf"), (peak + tl.log2(total)) / LOG2_E)
    tl.store(lse_ptr + output_rows, lse, mask=valid)


@triton.jit
def query_gradient_kernel(
    grad_ptr,
    offset_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    counts_ptr,
    indices_ptr,
    query_starts_ptr,
    key_starts_ptr,
    grad_query_ptr,
    heads,
    group,
    num_queries,
    num_keys,
    num_features,
    num_values,
    list_heads,
    list_stride_batch,
    list_rows,
    list_width,
    query_stride_batch,
    query_stride_head,
    query_stride_row,
    query_stride_feature,
    key_stride_batch,
    key_stride_head,
    key_stride_row,
    key_stride_feature,
    value_stride_batch,
    value_stride_head,
    value_stride_row,
    value_stride_feature,
    scale,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PACK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Gradient of a tile of queries, of ``PACK`` heads."""
    first = tl.program_id(0) * TILE_QUERIES
    first_head = tl.program_id(1).to(tl.int64) * PACK
    batch = tl.program_id(2).to(tl.int64)
    PACKED: tl.constexpr = query_starts_ptr is not None
    query_start, num_queries = _span(query_starts_ptr, batch, num_queries)
    key_start, num_keys = _span(key_starts_ptr, batch, num_keys)
    head, positions, valid = _rows(first, num_queries, TILE_QUERIES, PACK)
    features = tl.arange(0, FEATURES)
    values = tl.arange(0, VALUES)
    query_ptr += batch * query_stride_batch + query_start * query_stride_row
    query_rows = (first_head + head) * query_stride_head + positions.to(tl.int64) * query_stride_row
    queries = _kernels.tile(
        query_ptr, query_rows, valid, features, num_features, 1, query_stride_feature
    )
    rows = _results(batch, first_head + head, heads, query_start, positions, num_queries, PACKED)
    grads = _kernels.tile(grad_ptr, rows, valid, values, num_values, num_values, 1)
    offsets = tl.load(offset_ptr + rows, mask=valid, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=valid, other=0.0) * LOG2_E
    kv_head = first_head // group
    key_ptr += batch * key_stride_batch + kv_head * key_stride_head + key_start * key_stride_row
    value_ptr += batch * value_stride_batch + kv_head * value_stride_head
    value_ptr += key_start * value_stride_row
    list_row = batch * list_stride_batch + first_head * list_heads // heads * list_rows
    list_row += first // QUERY_BLOCK
    count = tl.load(counts_ptr + list_row)
    if PACKED:
        count = tl.where(first < num_queries, count, 0)
    last = tl.minimum(first + TILE_QUERIES, num_queries) - 1

    result = tl.zeros((PACK * TILE_QUERIES, FEATURES), tl.float32)
    for place in range(count):
        block = tl.load(indices_ptr + list_row * list_width + place)
        width = KEY_BLOCK
        if PACKED:
            width = tl.minimum(KEY_BLOCK, num_keys - block * KEY_BLOCK)
        for start in range(0, width, TILE_KEYS):
            columns = block * KEY_BLOCK + start + tl.arange(0, TILE_KEYS)
            present = columns < num_keys
            if (not IS_CAUSAL) or block * KEY_BLOCK + start <= last:
                keys = _kernels.tile(
                    key_ptr,
                    columns,
                    present,
                    features,
                    num_features,
                    key_stride_row,
                    key_stride_feature,
                )
                scores = _kernels.scores(
                    queries,
                    keys,
                    positions,
                    columns,
                    num_keys,
                    scale * LOG2_E,
                    IS_CAUSAL,
                    PRECISION,
                    INTERPRETED,
                )
                weights = tl.exp2(scores - lse[:, None])
                chosen = _kernels.tile(
                    value_ptr,
                    columns,
                    present,
                    values,
                    num_values,
                    value_stride_row,
                    value_stride_feature,
                )
                products = tl.zeros((PACK * TILE_QUERIES, TILE_KEYS), tl.float32)
                products = _triton.dot(grads, tl.trans(chosen), products, PRECISION, INTERPRETED)
                grad_scores = weights * (products - offsets[:, None])
                result = _triton.dot(
                    grad_scores.to(keys.dtype), keys, result, PRECISION, INTERPRETED
                )
    offsets = rows[:, None] * num_features + features[None, :]
    tl.store(
        grad_query_ptr + offsets,
        (result * scale).to(grad_query_ptr.dtype.element_ty),
        mask=valid[:, None] & (features < num_features)[None, :],
    )


@triton.jit
def key_gradient_kernel(
    grad_ptr,
    offset_ptr,
    lse_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    counts_ptr,
    indices_ptr,
    query_starts_ptr,
    key_starts_ptr,
    grad_key_ptr,
    grad_value_ptr,
    heads,
    group,
    num_queries,
    num_keys,
    num_features,
    num_values,
    list_heads,
    list_stride_batch,
    list_rows,
    list_width,
    query_stride_batch,
    query_stride_head,
    query_stride_row,
    query_stride_feature,
    key_stride_batch,
    key_stride_head,
    key_stride_row,
    key_stride_feature,
    value_stride_batch,
    value_stride_head,
    value_stride_row,
    value_stride_feature,
    scale,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Gradients of a tile of keys and values, from all heads of the group in turn."""
    first_key = tl.program_id(0) * TILE_KEYS
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    PACKED: tl.constexpr = query_starts_ptr is not None
    query_start, num_queries = _span(query_starts_ptr, batch, num_queries)
    key_start, num_keys = _span(key_starts_ptr, batch, num_keys)
    features = tl.arange(0, FEATURES)
    values = tl.arange(0, VALUES)
    columns = first_key + tl.arange(0, TILE_KEYS)
    present = columns < num_keys
    key_ptr += batch * key_stride_batch + kv_head * key_stride_head + key_start * key_stride_row
    value_ptr += batch * value_stride_batch + kv_head * value_stride_head
    value_ptr += key_start * value_stride_row
    query_ptr += batch * query_stride_batch + query_start * query_stride_row
    keys = _kernels.tile(
        key_ptr, columns, present, features, num_features, key_stride_row, key_stride_feature
    )
    chosen = _kernels.tile(
        value_ptr, columns, present, values, num_values, value_stride_row, value_stride_feature
    )
    grad_keys = tl.zeros((TILE_KEYS, FEATURES), tl.float32)
    grad_values = tl.zeros((TILE_KEYS, VALUES), tl.float32)
    for member in range(group):
        head = kv_head * group + member
        list_row = batch * list_stride_batch + head * list_heads // heads * list_rows
        list_row += first_key // KEY_BLOCK
        count = tl.load(counts_ptr + list_row)
        if PACKED:
            count = tl.where(first_key < num_keys, count, 0)
        for place in range(count):
            block = tl.load(indices_ptr + list_row * list_width + place)
            height = QUERY_BLOCK
            if PACKED:
                height = tl.minimum(QUERY_BLOCK, num_queries - block * QUERY_BLOCK)
            for start in range(0, height, TILE_QUERIES):
                positions = block * QUERY_BLOCK + start + tl.arange(0, TILE_QUERIES)
                valid = positions < num_queries
                last = block * QUERY_BLOCK + start + TILE_QUERIES - 1
                if (not IS_CAUSAL) or first_key <= last:
                    queries = _kernels.tile(
                        query_ptr + head * query_stride_head,
                        positions,
                        valid,
                        features,
                        num_features,
                        query_stride_row,
                        query_stride_feature,
                    )
                    rows = _results(batch, head, heads, query_start, positions, num_queries, PACKED)
                    grads = _kernels.tile(grad_ptr, rows, valid, values, num_values, num_values, 1)
                    offsets = tl.load(offset_ptr + rows, mask=valid, other=0.0)
                    lse = tl.load(lse_ptr + rows, mask=valid, other=0.0) * LOG2_E
                    scores = _kernels.scores(
                        queries,
                        keys,
                        positions,
                        columns,
                        num_keys,
                        scale * LOG2_E,
                        IS_CAUSAL,
                        PRECISION,
                        INTERPRETED,
                    )
                    weights = tl.exp2(scores - lse[:, None])
                    grad_values = _triton.dot(
                        tl.trans(weights.to(grads.dtype)),
                        grads,
                        grad_values,
                        PRECISION,
                        INTERPRETED,
                    )
                    products = tl.zeros((TILE_QUERIES, TILE_KEYS), tl.float32)
                    products = _triton.dot(
                        grads, tl.trans(chosen), products, PRECISION, INTERPRETED
                    )
                    grad_scores = weights * (products - offsets[:, None])
                    grad_keys = _triton.dot(
                        tl.trans(grad_scores.to(queries.dtype)),
                        queries,
                        grad_keys,
                        PRECISION,
                        INTERPRETED,
                    )
    kv_rows = _results(batch, kv_head, heads // group, key_start, columns, num_keys, PACKED)
    tl.store(
        grad_key_ptr + kv_rows[:, None] * num_features + features[None, :],
        (grad_keys * scale).to(grad_key_ptr.dtype.element_ty),
        mask=present[:, None] & (features < num_features)[None, :],
    )
    tl.store(
        grad_value_ptr + kv_rows[:, None] * num_values + values[None, :],
        grad_values.to(grad_value_ptr.dtype.element_ty),
        mask=present[:, None] & (values < num_values)[None, :],
    )


def forward(
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
    """See ``reference.block_sparse_attention``."""
    packed = query_starts is not None
    output, lse = empty_results(query, value, packed)
    if lse.numel() == 0:
        return output, lse
    sizes, constants = _arguments("forward", query, key, value, kv_indices, block_size, is_causal)
    pack = _pack(query, key, kv_indices, constants)
    rows = min(query.shape[2], kv_indices.shape[2] * block_size[0])
    batch = query.shape[0] if query_starts is None else len(query_starts) - 1
    forward_kernel[triton.cdiv(rows, constants["TILE_QUERIES"]), query.shape[1] // pack, batch](
        query,
        key,
        value,
        kv_num_blocks.contiguous(),
        kv_indices.contiguous(),
        query_starts,
        key_starts,
        output,
        lse,
        *sizes,
        *_strides(packed, query, key, value),
        scale,
        PACK=pack,
        **constants,
    )
    return output, lse


def backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_num_blocks: Tensor,
    q_indices: Tensor,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    block_size: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    packed = query_starts is not None
    grad_query, grad_key, grad_value = (empty_gradient(t, packed) for t in (query, key, value))
    grad_key.zero_()
    grad_value.zero_()
    if lse.numel() == 0:
        return grad_query, grad_key, grad_value
    offset = (grad_output.float() * output.float()).sum(-1) - grad_lse
    upstream = [grad_output, offset, lse.masked_fill(lse == -torch.inf, 0)]
    upstream = [(t.transpose(1, 2) if packed else t).contiguous() for t in upstream]
    strides = _strides(packed, query, key, value)
    batch = query.shape[0] if query_starts is None else len(query_starts) - 1

    sizes, constants = _arguments("query", query, key, value, kv_indices, block_size, is_causal)
    pack = _pack(query, key, kv_indices, constants)
    rows = min(query.shape[2], kv_indices.shape[2] * block_size[0])
    grid = triton.cdiv(rows, constants["TILE_QUERIES"]), query.shape[1] // pack, batch
    query_gradient_kernel[grid](
        *upstream,
        query,
        key,
        value,
        kv_num_blocks.contiguous(),
        kv_indices.contiguous(),
        query_starts,
        key_starts,
        grad_query,
        *sizes,
        *strides,
        scale,
        PACK=pack,
        **constants,
    )
    if key.numel() == 0:
        return grad_query, grad_key, grad_value
    sizes, constants = _arguments("key", query, key, value, q_indices, block_size, is_causal)
    constants.pop("ROWS")
    rows = min(key.shape[2], q_indices.shape[2] * block_size[1])
    key_gradient_kernel[triton.cdiv(rows, constants["TILE_KEYS"]), key.shape[1], batch](
        *upstream,
        query,
        key,
        value,
        q_num_blocks.contiguous(),
        q_indices.contiguous(),
        query_starts,
        key_starts,
        grad_key,
        grad_value,
        *sizes,
        *strides,
        scale,
        **constants,
    )
    return grad_query, grad_key, grad_value


def _strides(packed: bool, *tensors: Tensor) -> list[int]:
    """The strides of tensors; packed sequences have none between them."""
    return [
        0 if packed and dim == 0 else stride
        for tensor in tensors
        for dim, stride in enumerate(tensor.stride())
    ]


def _arguments(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    block_size: list[int],
    is_causal: bool,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """What all kernels take: sizes of the tensors and of the lists, and constants."""
    heads, kv_heads = query.shape[1], key.shape[1]
    list_batch, list_heads, list_rows, list_width = indices.shape
    sizes = (
        heads,
        heads // kv_heads,
        query.shape[2],
        key.shape[2],
        query.shape[3],
        value.shape[3],
        list_heads,
        0 if list_batch == 1 else list_heads * list_rows,
        list_rows,
        list_width,
    )
    features, values = (max(16, triton.next_power_of_2(t.shape[-1])) for t in (query, value))
    arch = _triton.architecture(query.device)
    rows, keys, warps, stages = TILES[kernel].choose(arch, query.dtype, max(features, values))
    constants = {
        "IS_CAUSAL": is_causal,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "INTERPRETED": _triton.INTERPRETED,
        "QUERY_BLOCK": block_size[0],
        "KEY_BLOCK": block_size[1],
        "ROWS": rows,
        "TILE_QUERIES": min(block_size[0], rows),
        "TILE_KEYS": min(block_size[1], keys),
        "FEATURES": features,
        "VALUES": values,
        "num_warps": 1 if _triton.INTERPRETED else warps,
        "num_stages": stages,
    }
    return sizes, constants


def _pack(query: Tensor, key: Tensor, indices: Tensor, constants: dict[str, Any]) -> int:
    """How many heads of a group go together: a power of 2, as they share keys and a list."""
    heads, kv_heads, list_heads = query.shape[1], key.shape[1], indices.shape[1]
    group = heads // kv_heads
    rows = constants.pop("ROWS")
    if list_heads not in (1, kv_heads):
        return 1
    pack = 1
    while group % (2 * pack) == 0 and 2 * pack * constants["TILE_QUERIES"] <= rows:
        pack *= 2
    return pack
