"""Block-sparse attention on the GPU: kernels, tile sizes and launchers.

A program takes a tile of queries, of several heads of a group where they share a list, and walks
the list of its block. Gradients of keys and values walk the transposed lists. There are no locks
and no atomics.

Packed sequences are the elements of a batch: each has its span of the rows. Results are contiguous
as ``(batch, heads, rows)`` or, packed, as ``(rows, heads)``.

All kernels take ``tensors``, query, key and value, with their ``strides``; ``lists``, counts and
indices, with ``list_sizes``: heads, stride of the batch, rows and width; ``starts``, of queries and
keys of packed sequences, or None; ``sizes``: heads, heads of a group, queries, keys, features and
values. In another order some spill on gfx942, which loads arguments into scalar registers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilework import _triton
from tilework._operators import Needed
from tilework._triton import Tuned
from tilework.attention import _kernels
from tilework.attention._kernels import LOG2_E, MAX_FEATURES, Tile
from tilework.attention._tensors import scale_of
from tilework.attention.block_sparse.common import (
    Attended,
    Attention,
    empty_gradient,
    empty_results,
)

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
def _sequence(starts, sizes, batch):
    """Where the queries and keys of an element of the batch start, and its own sizes."""
    if starts is None:
        return (0, 0), sizes
    else:
        heads, group, _, _, num_features, num_values = sizes
        query_start = tl.load(starts[0] + batch).to(tl.int64)
        num_queries = (tl.load(starts[0] + batch + 1) - query_start).to(tl.int32)
        key_start = tl.load(starts[1] + batch).to(tl.int64)
        num_keys = (tl.load(starts[1] + batch + 1) - key_start).to(tl.int32)
        sizes = heads, group, num_queries, num_keys, num_features, num_values
        return (query_start, key_start), sizes


@triton.jit
def _head(pointer, strides, batch, head, start):
    """The first row of a head, of a sequence that starts at a row."""
    return pointer + batch * strides[0] + head * strides[1] + start * strides[2]


@triton.jit
def _list(
    lists,
    list_sizes,
    batch,
    head,
    heads,
    first,
    length,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """How many blocks the block of a first position meets, and where their numbers stand."""
    list_heads, stride_batch, list_rows, list_width = list_sizes
    row = batch * stride_batch + head * list_heads // heads * list_rows + first // BLOCK
    count = tl.load(lists[0] + row)
    if PACKED:
        # The lists are those of the longest sequence; a shorter one has fewer blocks.
        count = tl.where(first < length, count, 0)
    return count, lists[1] + row * list_width


@triton.jit
def _results(batch, head, heads, start, positions, length, PACKED: tl.constexpr):
    """Where the results of positions lie, in rows."""
    if PACKED:
        return (start + positions) * heads + head
    else:
        return (batch * heads + head) * length + positions


@triton.jit
def _queries(
    pointer,
    strides,
    start,
    sizes,
    PACK: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    FEATURES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The program's tile of queries of ``PACK`` heads.

    With their positions, which of them there are, and the rows of their results.
    """
    heads, _, num_queries, _, num_features, _ = sizes
    batch = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, PACK * TILE_QUERIES)
    head = tl.program_id(1).to(tl.int64) * PACK + row // TILE_QUERIES
    positions = tl.program_id(0) * TILE_QUERIES + row % TILE_QUERIES
    valid = positions < num_queries
    pointer += batch * strides[0] + start * strides[2]
    offsets = head * strides[1] + positions.to(tl.int64) * strides[2]
    queries = _kernels.tile(pointer, offsets, valid, num_features, 1, strides[3], FEATURES)
    rows = _results(batch, head, heads, start, positions, num_queries, PACKED)
    return queries, positions, valid, rows


@triton.jit
def _blocks_of_keys(
    tensors,
    lists,
    start,
    sizes,
    list_sizes,
    strides,
    PACK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The keys and values that the program's tile of queries may see.

    With the length and the place of the list of blocks, and the last position of the tile.
    """
    heads, group, num_queries, _, _, _ = sizes
    first = tl.program_id(0) * TILE_QUERIES
    head = tl.program_id(1).to(tl.int64) * PACK
    batch = tl.program_id(2).to(tl.int64)
    key_ptr = _head(tensors[1], strides[1], batch, head // group, start)
    value_ptr = _head(tensors[2], strides[2], batch, head // group, start)
    count, list_ptr = _list(
        lists, list_sizes, batch, head, heads, first, num_queries, QUERY_BLOCK, PACKED
    )
    last = tl.minimum(first + TILE_QUERIES, num_queries) - 1
    return key_ptr, value_ptr, count, list_ptr, last


@triton.jit
def forward_kernel(
    tensors,
    lists,
    starts,
    output_ptr,
    lse_ptr,
    sizes,
    list_sizes,
    strides,
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
    """Output and log-sum-exp of a tile of queries, of ``PACK`` heads.

    A row has a peak ``m``, a sum ``l`` of weights and one ``o`` of weighted values, from -inf, 0
    and 0. Each tile of keys, in the order of the list, with scores ``s_j`` to the base of 2, makes

        m' = max(m, max_j s_j),  w_j = 2^(s_j - m'),  d = 2^(m - m'),
        l' = d l + sum_j w_j,    o' = d o + sum_j w_j v_j

    of them. At the end the output is ``o / l``, and the log-sum-exp ``(m + log2 l) / log2 e``.
    """
    PACKED: tl.constexpr = starts is not None
    _, key_strides, value_strides = strides
    starts, sizes = _sequence(starts, sizes, tl.program_id(2).to(tl.int64))
    _, _, _, num_keys, num_features, num_values = sizes
    queries, positions, valid, rows = _queries(
        tensors[0], strides[0], starts[0], sizes, PACK, TILE_QUERIES, FEATURES, PACKED
    )
    key_ptr, value_ptr, count, list_ptr, last = _blocks_of_keys(
        tensors,
        lists,
        starts[1],
        sizes,
        list_sizes,
        strides,
        PACK,
        QUERY_BLOCK,
        TILE_QUERIES,
        PACKED,
    )
    peak = tl.full((PACK * TILE_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((PACK * TILE_QUERIES,), tl.float32)
    result = tl.zeros((PACK * TILE_QUERIES, VALUES), tl.float32)
    for place in range(count):
        block = tl.load(list_ptr + place)
        width = KEY_BLOCK
        if PACKED:
            # The last block of a sequence may have fewer tiles.
            width = tl.minimum(KEY_BLOCK, num_keys - block * KEY_BLOCK)
        for start in range(0, width, TILE_KEYS):
            columns = block * KEY_BLOCK + start + tl.arange(0, TILE_KEYS)
            present = columns < num_keys
            # Behind the diagonal of all rows a tile of an active block has nothing to see.
            if (not IS_CAUSAL) or block * KEY_BLOCK + start <= last:
                keys = _kernels.tile(
                    key_ptr, columns, present, num_features, *key_strides[2:], FEATURES
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
                    value_ptr, columns, present, num_values, *value_strides[2:], VALUES
                )
                result = _triton.dot(
                    weights.to(chosen.dtype),
                    chosen,
                    result * decay[:, None],
                    PRECISION,
                    INTERPRETED,
                )
    result /= tl.where(total == 0, 1.0, total)[:, None]
    _kernels.store(output_ptr, rows, valid, num_values, result)
    lse = tl.where(total == 0, float("-inf"), (peak + tl.log2(total)) / LOG2_E)
    tl.store(lse_ptr + rows, lse, mask=valid)


@triton.jit
def query_gradient_kernel(
    upstream,
    tensors,
    lists,
    starts,
    grad_query_ptr,
    sizes,
    list_sizes,
    strides,
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
    """Gradient of a tile of queries, of ``PACK`` heads.

    With the gradient ``g_i`` of the output, ``offset_i = g_i o_i - h_i`` and the gradient ``h_i``
    of the log-sum-exp, over the tiles of keys in the order of the list,

        w_ij = 2^(s_ij - lse_i),  e_ij = w_ij (g_i v_j - offset_i),
        grad_query_i = scale sum_j e_ij k_j
    """
    grad_ptr, offset_ptr, lse_ptr = upstream
    PACKED: tl.constexpr = starts is not None
    _, key_strides, value_strides = strides
    starts, sizes = _sequence(starts, sizes, tl.program_id(2).to(tl.int64))
    _, _, _, num_keys, num_features, num_values = sizes
    queries, positions, valid, rows = _queries(
        tensors[0], strides[0], starts[0], sizes, PACK, TILE_QUERIES, FEATURES, PACKED
    )
    grads = _kernels.tile(grad_ptr, rows, valid, num_values, num_values, 1, VALUES)
    offsets = tl.load(offset_ptr + rows, mask=valid, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=valid, other=0.0) * LOG2_E
    key_ptr, value_ptr, count, list_ptr, last = _blocks_of_keys(
        tensors,
        lists,
        starts[1],
        sizes,
        list_sizes,
        strides,
        PACK,
        QUERY_BLOCK,
        TILE_QUERIES,
        PACKED,
    )
    result = tl.zeros((PACK * TILE_QUERIES, FEATURES), tl.float32)
    for place in range(count):
        block = tl.load(list_ptr + place)
        width = KEY_BLOCK
        if PACKED:
            width = tl.minimum(KEY_BLOCK, num_keys - block * KEY_BLOCK)
        for start in range(0, width, TILE_KEYS):
            columns = block * KEY_BLOCK + start + tl.arange(0, TILE_KEYS)
            present = columns < num_keys
            if (not IS_CAUSAL) or block * KEY_BLOCK + start <= last:
                keys = _kernels.tile(
                    key_ptr, columns, present, num_features, *key_strides[2:], FEATURES
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
                    value_ptr, columns, present, num_values, *value_strides[2:], VALUES
                )
                products = tl.zeros((PACK * TILE_QUERIES, TILE_KEYS), tl.float32)
                products = _triton.dot(grads, tl.trans(chosen), products, PRECISION, INTERPRETED)
                grad_scores = weights * (products - offsets[:, None])
                result = _triton.dot(
                    grad_scores.to(keys.dtype), keys, result, PRECISION, INTERPRETED
                )
    _kernels.store(grad_query_ptr, rows, valid, num_features, result * scale)


@triton.jit
def key_gradient_kernel(
    upstream,
    tensors,
    lists,
    starts,
    grad_key_ptr,
    grad_value_ptr,
    sizes,
    list_sizes,
    strides,
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
    """Gradients of a tile of keys and values, from all heads of the group in turn.

    With the weights and gradients of scores of ``query_gradient_kernel``, over the heads of the
    group and for each over the tiles of queries in the order of the transposed list,

        grad_value_j = sum_i w_ij g_i,  grad_key_j = scale sum_i e_ij q_i
    """
    grad_ptr, offset_ptr, lse_ptr = upstream
    PACKED: tl.constexpr = starts is not None
    query_strides, key_strides, value_strides = strides
    first_key = tl.program_id(0) * TILE_KEYS
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    starts, sizes = _sequence(starts, sizes, batch)
    query_start, key_start = starts
    heads, group, num_queries, num_keys, num_features, num_values = sizes
    columns = first_key + tl.arange(0, TILE_KEYS)
    present = columns < num_keys
    key_ptr = _head(tensors[1], key_strides, batch, kv_head, key_start)
    value_ptr = _head(tensors[2], value_strides, batch, kv_head, key_start)
    query_ptr = _head(tensors[0], query_strides, batch, 0, query_start)
    keys = _kernels.tile(key_ptr, columns, present, num_features, *key_strides[2:], FEATURES)
    chosen = _kernels.tile(value_ptr, columns, present, num_values, *value_strides[2:], VALUES)
    grad_keys = tl.zeros((TILE_KEYS, FEATURES), tl.float32)
    grad_values = tl.zeros((TILE_KEYS, VALUES), tl.float32)
    for member in range(group):
        head = kv_head * group + member
        count, list_ptr = _list(
            lists, list_sizes, batch, head, heads, first_key, num_keys, KEY_BLOCK, PACKED
        )
        for place in range(count):
            block = tl.load(list_ptr + place)
            height = QUERY_BLOCK
            if PACKED:
                height = tl.minimum(QUERY_BLOCK, num_queries - block * QUERY_BLOCK)
            for start in range(0, height, TILE_QUERIES):
                positions = block * QUERY_BLOCK + start + tl.arange(0, TILE_QUERIES)
                valid = positions < num_queries
                last = block * QUERY_BLOCK + start + TILE_QUERIES - 1
                # Before the diagonal of all columns a tile of an active block sees nothing.
                if (not IS_CAUSAL) or first_key <= last:
                    queries = _kernels.tile(
                        query_ptr + head * query_strides[1],
                        positions,
                        valid,
                        num_features,
                        *query_strides[2:],
                        FEATURES,
                    )
                    rows = _results(batch, head, heads, query_start, positions, num_queries, PACKED)
                    # Queries past the end have weights of 1, but upstream gradients of 0.
                    grads = _kernels.tile(grad_ptr, rows, valid, num_values, num_values, 1, VALUES)
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
    rows = _results(batch, kv_head, heads // group, key_start, columns, num_keys, PACKED)
    _kernels.store(grad_key_ptr, rows, present, num_features, grad_keys * scale)
    _kernels.store(grad_value_ptr, rows, present, num_values, grad_values)


def forward(given: Attention) -> Attended:
    """See ``reference``."""
    results = empty_results(given)
    if results.lse.numel() == 0:
        return results
    lists, starts, *sizes = _arguments(given, given.kv_num_blocks, given.kv_indices)
    constants = _constants("forward", given)
    pack = _pack(given, constants)
    forward_kernel[_grid(given, constants, pack)](
        (given.query, given.key, given.value),
        lists,
        starts,
        *results,
        *sizes,
        scale_of(given),
        PACK=pack,
        **constants,
    )
    return results


def backward(given: Attention, results: Attended, grads: Attended, _: Needed) -> dict[str, Tensor]:
    """Gradients of query, key and value."""
    tensors = given.query, given.key, given.value
    packed = given.query_starts is not None
    grad_query, grad_key, grad_value = (empty_gradient(t, packed) for t in tensors)
    grad_key.zero_()
    grad_value.zero_()
    found = {"query": grad_query, "key": grad_key, "value": grad_value}
    if results.lse.numel() == 0:
        return found
    grad_output = torch.zeros_like(results.output) if grads.output is None else grads.output
    offset = (grad_output.float() * results.output.float()).sum(-1)
    if grads.lse is not None:
        offset -= grads.lse
    # Where nothing is seen the scores are -inf too, and the weights must be 0, not nan.
    rows = grad_output, offset, results.lse.masked_fill(results.lse == -torch.inf, 0)
    upstream = tuple((t.transpose(1, 2) if packed else t).contiguous() for t in rows)

    lists, starts, *sizes = _arguments(given, given.kv_num_blocks, given.kv_indices)
    constants = _constants("query", given)
    pack = _pack(given, constants)
    query_gradient_kernel[_grid(given, constants, pack)](
        upstream,
        tensors,
        lists,
        starts,
        grad_query,
        *sizes,
        scale_of(given),
        PACK=pack,
        **constants,
    )
    if given.key.numel() == 0:
        return found
    counts, indices = given.q_num_blocks, given.q_indices
    assert counts is not None  # where there are gradients, there are transposed lists
    assert indices is not None
    lists, starts, *sizes = _arguments(given, counts, indices)
    constants = _constants("key", given)
    constants.pop("ROWS")
    length = min(given.key.shape[2], indices.shape[2] * given.block_size[1])
    grid = triton.cdiv(length, constants["TILE_KEYS"]), given.key.shape[1], _batch(given)
    key_gradient_kernel[grid](
        upstream,
        tensors,
        lists,
        starts,
        grad_key,
        grad_value,
        *sizes,
        scale_of(given),
        **constants,
    )
    return found


def _batch(given: Attention) -> int:
    """The elements of the batch, or the packed sequences."""
    starts = given.query_starts
    return given.query.shape[0] if starts is None else len(starts) - 1


def _grid(given: Attention, constants: dict[str, Any], pack: int) -> tuple[int, int, int]:
    """A program for each tile of queries of each pack of heads."""
    _, heads, queries, _ = given.query.shape
    length = min(queries, given.kv_indices.shape[2] * given.block_size[0])
    return triton.cdiv(length, constants["TILE_QUERIES"]), heads // pack, _batch(given)


def _arguments(given: Attention, counts: Tensor, indices: Tensor) -> tuple[Any, ...]:
    """The lists, where packed sequences start, sizes of tensors and of lists, and strides."""
    query, key, value = given.query, given.key, given.value
    heads, kv_heads = query.shape[1], key.shape[1]
    sizes = heads, heads // kv_heads, query.shape[2], key.shape[2], query.shape[3], value.shape[3]
    list_batch, list_heads, list_rows, list_width = indices.shape
    stride_batch = 0 if list_batch == 1 else list_heads * list_rows
    strides: tuple[tuple[int, ...], ...] = query.stride(), key.stride(), value.stride()
    starts = None
    if given.query_starts is not None:
        starts = given.query_starts, given.key_starts
        # There is one element of the batch, in which the sequences lie.
        strides = tuple((0, *one[1:]) for one in strides)
    return (
        (counts.contiguous(), indices.contiguous()),
        starts,
        sizes,
        (list_heads, stride_batch, list_rows, list_width),
        strides,
    )


def _constants(kernel: str, given: Attention) -> dict[str, Any]:
    """The constants of a kernel, and the rows of a tile of all heads."""
    query, block_size = given.query, given.block_size
    features, values = (max(16, triton.next_power_of_2(t.shape[-1])) for t in (query, given.value))
    arch = _triton.architecture(query.device)
    rows, keys, warps, stages = TILES[kernel].choose(arch, query.dtype, max(features, values))
    return {
        "IS_CAUSAL": given.is_causal,
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


def _pack(given: Attention, constants: dict[str, Any]) -> int:
    """How many heads of a group go together: a power of 2, as they share keys and a list."""
    heads, kv_heads = given.query.shape[1], given.key.shape[1]
    list_heads = given.kv_indices.shape[1]
    group = heads // kv_heads
    rows = constants.pop("ROWS")
    if list_heads not in (1, kv_heads):
        return 1
    pack = 1
    while group % (2 * pack) == 0 and 2 * pack * constants["TILE_QUERIES"] <= rows:
        pack *= 2
    return pack
