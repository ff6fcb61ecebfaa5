"""Reductions of the map of attention on the GPU: kernels, tile sizes and launchers.

A program takes a tile of queries and walks the keys, or a tile of keys and walks the queries, and
stops at the diagonal. There are no locks and no atomics.

All kernels take ``sizes``: heads, heads of a group, queries, keys and features. Results lie in
contiguous memory, with a row for each query or key of each head.
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
from tilework.attention._attention_map.common import (
    Blocks,
    Columns,
    Entropy,
    LogSumExp,
    Mass,
    Pooled,
    Queries,
    Rows,
    upstream_of_entropy,
)
from tilework.attention._kernels import MAX_FEATURES, Tile
from tilework.attention._tensors import scale_of

_WIDE, _TALL, _DEEP = Tile(128, 64, 8, 2), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)
_SQUARE, _LOW, _SMALL = Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), Tile(16, 16, 4, 1)
_INTERPRETER = Tile(32, 32, 1, 1)
# Up to so many features: the largest of those tried that do not spill registers. Products of
# float32 take many: some spill.
TILES = {
    "rows": Tuned[Tile](
        {
            "interpreter": _INTERPRETER,
            "sm_80": _DEEP,
            "sm_100": {64: _DEEP, 128: Tile(128, 64, 4, 3), 256: _DEEP},
            "gfx942": {128: _DEEP, 256: _WIDE},
            "float32": Tile(32, 32, 8, 2),
        },
        otherwise="sm_80",
    ),
    "columns": Tuned[Tile](
        {
            "interpreter": _INTERPRETER,
            "sm_80": _TALL,
            "sm_100": {128: _DEEP, 256: _TALL},
            "gfx942": Tile(32, 32, 4, 2),
            "float32": Tile(32, 32, 4, 2),
        },
        otherwise="sm_80",
    ),
    "pool": Tuned[Tile](
        {
            "interpreter": _INTERPRETER,
            "sm_80": Tile(64, 64, 4, 3),
            "sm_100": {64: Tile(64, 64, 4, 3), 256: Tile(64, 64, 8, 3)},
            "gfx942": _SMALL,
            "float32": _SMALL,
        },
        otherwise="sm_80",
    ),
    "query": Tuned[Tile](
        {
            "interpreter": _INTERPRETER,
            "sm_80": {128: _WIDE, 256: _SQUARE},
            "sm_90": _WIDE,
            "sm_100": _WIDE,
            "gfx942": {64: _WIDE, 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 2)},
            "float32": _SMALL,
        },
        otherwise="sm_80",
    ),
    "key": Tuned[Tile](
        {
            "interpreter": _INTERPRETER,
            "sm_80": {64: _SQUARE, 128: Tile(32, 32, 4, 2), 256: _SQUARE},
            "sm_90": {128: _SQUARE, 256: _LOW},
            "sm_100": {64: Tile(64, 64, 4, 2), 128: _SQUARE, 256: _LOW},
            "gfx942": _SMALL,
            "float32": _SMALL,
        },
        otherwise="sm_80",
    ),
}


def refusal(features: int) -> str | None:
    """Why the kernels do not take so many features, if they do not."""
    if 0 < features <= MAX_FEATURES:
        return None
    return f"it takes 1 to {MAX_FEATURES} features, got {features}"


@triton.jit
def _rows(pointer, batch, head, strides, positions, length, num_features, FEATURES: tl.constexpr):
    """Rows of a head of query or key, zeros where there are none."""
    pointer += batch * strides[0] + head * strides[1]
    return _kernels.tile(
        pointer, positions, positions < length, num_features, strides[2], strides[3], FEATURES
    )


@triton.jit
def _lse(lse_ptr, rows, valid):
    """Log-sum-exps; infinite, for weights of zero, where nothing is seen."""
    lse = tl.load(lse_ptr + rows, mask=valid, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def lse_kernel(
    query_ptr,
    key_ptr,
    lse_ptr,
    sizes,
    query_strides,
    key_strides,
    scale,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Log-sum-exp of a tile of queries."""
    heads, group, num_queries, num_keys, num_features = sizes
    first = tl.program_id(0) * TILE_QUERIES
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    positions = first + tl.arange(0, TILE_QUERIES)
    queries = _rows(
        query_ptr, batch, head, query_strides, positions, num_queries, num_features, FEATURES
    )
    peak = tl.full((TILE_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_QUERIES,), tl.float32)
    end = tl.minimum(num_keys, first + TILE_QUERIES) if IS_CAUSAL else num_keys
    for start in range(0, end, TILE_KEYS):
        columns = start + tl.arange(0, TILE_KEYS)
        keys = _rows(
            key_ptr, batch, head // group, key_strides, columns, num_keys, num_features, FEATURES
        )
        scores = _kernels.scores(
            queries, keys, positions, columns, num_keys, scale, IS_CAUSAL, PRECISION, INTERPRETED
        )
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # A query that has seen nothing has no finite peak to subtract.
        base = tl.where(tl.abs(new_peak) == float("inf"), 0.0, new_peak)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(scores - base[:, None]), 1)
        peak = new_peak
    base = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
    lse = tl.where(total == 0, float("-inf"), base + tl.log(total))
    rows = (batch * heads + head) * num_queries + positions
    tl.store(lse_ptr + rows, lse, mask=positions < num_queries)


@triton.jit
def entropy_kernel(
    query_ptr,
    key_ptr,
    lse_ptr,
    entropy_ptr,
    total_ptr,
    sizes,
    query_strides,
    key_strides,
    scale,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Entropy and sum of the rows of a tile of queries."""
    heads, group, num_queries, num_keys, num_features = sizes
    first = tl.program_id(0) * TILE_QUERIES
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    positions = first + tl.arange(0, TILE_QUERIES)
    valid = positions < num_queries
    rows = (batch * heads + head) * num_queries + positions
    queries = _rows(
        query_ptr, batch, head, query_strides, positions, num_queries, num_features, FEATURES
    )
    lse = _lse(lse_ptr, rows, valid)
    entropy = tl.zeros((TILE_QUERIES,), tl.float32)
    total = tl.zeros((TILE_QUERIES,), tl.float32)
    end = tl.minimum(num_keys, first + TILE_QUERIES) if IS_CAUSAL else num_keys
    for start in range(0, end, TILE_KEYS):
        columns = start + tl.arange(0, TILE_KEYS)
        keys = _rows(
            key_ptr, batch, head // group, key_strides, columns, num_keys, num_features, FEATURES
        )
        scores = _kernels.scores(
            queries, keys, positions, columns, num_keys, scale, IS_CAUSAL, PRECISION, INTERPRETED
        )
        logs = scores - lse[:, None]
        weights = tl.exp(logs)
        total += tl.sum(weights, 1)
        entropy -= tl.sum(weights * tl.where(weights == 0, 0.0, logs), 1)
    tl.store(entropy_ptr + rows, entropy, mask=valid)
    tl.store(total_ptr + rows, total, mask=valid)


@triton.jit
def column_mass_kernel(
    query_ptr,
    key_ptr,
    lse_ptr,
    mass_ptr,
    first_query,
    sizes,
    query_strides,
    key_strides,
    scale,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Sums of the columns of a tile of keys over the queries from ``first_query`` on."""
    heads, group, num_queries, num_keys, num_features = sizes
    first = tl.program_id(0) * TILE_KEYS
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    columns = first + tl.arange(0, TILE_KEYS)
    keys = _rows(
        key_ptr, batch, head // group, key_strides, columns, num_keys, num_features, FEATURES
    )
    mass = tl.zeros((TILE_KEYS,), tl.float32)
    begin = tl.maximum(first_query, first) if IS_CAUSAL else first_query
    for start in range(begin, num_queries, TILE_QUERIES):
        positions = start + tl.arange(0, TILE_QUERIES)
        queries = _rows(
            query_ptr, batch, head, query_strides, positions, num_queries, num_features, FEATURES
        )
        rows = (batch * heads + head) * num_queries + positions
        lse = _lse(lse_ptr, rows, positions < num_queries)
        scores = _kernels.scores(
            queries, keys, positions, columns, num_keys, scale, IS_CAUSAL, PRECISION, INTERPRETED
        )
        mass += tl.sum(tl.exp(scores - lse[:, None]), 0)
    rows = (batch * heads + head) * num_keys + columns
    tl.store(mass_ptr + rows, mass, mask=columns < num_keys)


@triton.jit
def pool_kernel(
    query_ptr,
    key_ptr,
    lse_ptr,
    pooled_ptr,
    sizes,
    query_strides,
    key_strides,
    scale,
    height,
    width,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    LARGEST: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Largest entries or sums of a row of blocks of ``height`` queries and ``width`` keys.

    One block of keys after another, up to the diagonal: over the tiles of its queries, and for each
    over the tiles of its keys, row ``i`` of a tile of queries gathers

        l_i += sum_j p_ij,  m_i = max(m_i, max_j p_ij),  p_ij = exp(s_ij - lse_i)

    of all queries that stand there, and the sum or the maximum of these is the block's.
    """
    heads, group, num_queries, num_keys, num_features = sizes
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    pooled_ptr += ((batch * heads + head) * tl.num_programs(0) + row) * tl.cdiv(num_keys, width)
    last_query = tl.minimum((row + 1) * height, num_queries)
    end = tl.minimum(num_keys, last_query) if IS_CAUSAL else num_keys
    for block in range(tl.cdiv(end, width)):
        last_key = tl.minimum((block + 1) * width, end)
        largest = tl.zeros((TILE_QUERIES,), tl.float32)
        total = tl.zeros((TILE_QUERIES,), tl.float32)
        for first in range(row * height, last_query, TILE_QUERIES):
            positions = first + tl.arange(0, TILE_QUERIES)
            queries = _rows(
                query_ptr, batch, head, query_strides, positions, last_query, num_features, FEATURES
            )
            lse_rows = (batch * heads + head) * num_queries + positions
            lse = _lse(lse_ptr, lse_rows, positions < last_query)
            for start in range(block * width, last_key, TILE_KEYS):
                columns = start + tl.arange(0, TILE_KEYS)
                keys = _rows(
                    key_ptr,
                    batch,
                    head // group,
                    key_strides,
                    columns,
                    last_key,
                    num_features,
                    FEATURES,
                )
                scores = _kernels.scores(
                    queries,
                    keys,
                    positions,
                    columns,
                    last_key,
                    scale,
                    IS_CAUSAL,
                    PRECISION,
                    INTERPRETED,
                )
                weights = tl.exp(scores - lse[:, None])
                total += tl.sum(weights, 1)
                if LARGEST:
                    largest = tl.maximum(largest, tl.max(weights, 1))
        result = tl.sum(total, 0)
        if LARGEST:
            # Maxima pass over nan, sums do not.
            result = tl.where(result == result, tl.max(largest, 0), result)
        tl.store(pooled_ptr + block, result)


@triton.jit
def _grad_scores(scores, lse, offset, slope, SLOPED: tl.constexpr):
    """Gradients of scores."""
    logs = scores - lse[:, None]
    weights = tl.exp(logs)
    if SLOPED:
        return weights * (offset[:, None] + slope[:, None] * tl.where(weights == 0, 0.0, logs))
    return weights * offset[:, None]


@triton.jit
def query_gradient_kernel(
    query_ptr,
    key_ptr,
    lse_ptr,
    offset_ptr,
    slope_ptr,
    grad_ptr,
    sizes,
    query_strides,
    key_strides,
    scale,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    SLOPED: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Gradient of a tile of queries."""
    heads, group, num_queries, num_keys, num_features = sizes
    first = tl.program_id(0) * TILE_QUERIES
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    positions = first + tl.arange(0, TILE_QUERIES)
    valid = positions < num_queries
    rows = (batch * heads + head) * num_queries + positions
    queries = _rows(
        query_ptr, batch, head, query_strides, positions, num_queries, num_features, FEATURES
    )
    lse = _lse(lse_ptr, rows, valid)
    offset = tl.load(offset_ptr + rows, mask=valid, other=0.0)
    slope = tl.load(slope_ptr + rows, mask=valid, other=0.0)
    grad = tl.zeros((TILE_QUERIES, FEATURES), tl.float32)
    end = tl.minimum(num_keys, first + TILE_QUERIES) if IS_CAUSAL else num_keys
    for start in range(0, end, TILE_KEYS):
        columns = start + tl.arange(0, TILE_KEYS)
        keys = _rows(
            key_ptr, batch, head // group, key_strides, columns, num_keys, num_features, FEATURES
        )
        scores = _kernels.scores(
            queries, keys, positions, columns, num_keys, scale, IS_CAUSAL, PRECISION, INTERPRETED
        )
        grad_scores = _grad_scores(scores, lse, offset, slope, SLOPED)
        grad = _triton.dot(grad_scores.to(keys.dtype), keys, grad, PRECISION, INTERPRETED)
    _kernels.store(grad_ptr, rows, valid, num_features, grad * scale)


@triton.jit
def key_gradient_kernel(
    query_ptr,
    key_ptr,
    lse_ptr,
    offset_ptr,
    slope_ptr,
    grad_ptr,
    sizes,
    query_strides,
    key_strides,
    scale,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    SLOPED: tl.constexpr,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Gradient of a tile of keys, from all heads of the group in turn.

    For each over the tiles of queries, from the diagonal on, in their order, with ``p_ij =
    exp(s_ij - lse_i)``,

        grad_key_j = scale sum_i p_ij (offset_i + slope_i log p_ij) q_i
    """
    heads, group, num_queries, num_keys, num_features = sizes
    first = tl.program_id(0) * TILE_KEYS
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    columns = first + tl.arange(0, TILE_KEYS)
    keys = _rows(key_ptr, batch, kv_head, key_strides, columns, num_keys, num_features, FEATURES)
    grad = tl.zeros((TILE_KEYS, FEATURES), tl.float32)
    begin = first if IS_CAUSAL else 0
    for member in range(group):
        head = kv_head * group + member
        for start in range(begin, num_queries, TILE_QUERIES):
            positions = start + tl.arange(0, TILE_QUERIES)
            valid = positions < num_queries
            rows = (batch * heads + head) * num_queries + positions
            queries = _rows(
                query_ptr,
                batch,
                head,
                query_strides,
                positions,
                num_queries,
                num_features,
                FEATURES,
            )
            lse = _lse(lse_ptr, rows, valid)
            offset = tl.load(offset_ptr + rows, mask=valid, other=0.0)
            slope = tl.load(slope_ptr + rows, mask=valid, other=0.0)
            scores = _kernels.scores(
                queries,
                keys,
                positions,
                columns,
                num_keys,
                scale,
                IS_CAUSAL,
                PRECISION,
                INTERPRETED,
            )
            grad_scores = _grad_scores(scores, lse, offset, slope, SLOPED)
            grad = _triton.dot(
                tl.trans(grad_scores.to(queries.dtype)), queries, grad, PRECISION, INTERPRETED
            )
    rows = (batch * (heads // group) + kv_head) * num_keys + columns
    _kernels.store(grad_ptr, rows, columns < num_keys, num_features, grad * scale)


def attention_lse(given: Queries) -> LogSumExp:
    """See ``reference``."""
    query, key = given.query, given.key
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if lse.numel():
        arguments, constants = _arguments("rows", given)
        lse_kernel[_grid(query, constants["TILE_QUERIES"])](
            query, key, lse, *arguments, **constants
        )
    return LogSumExp(lse)


def attention_entropy(given: Rows) -> Entropy:
    """See ``reference``."""
    query, key, lse = given.query, given.key, given.lse
    entropy, total = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
    if entropy.numel():
        arguments, constants = _arguments("rows", given)
        entropy_kernel[_grid(query, constants["TILE_QUERIES"])](
            query, key, lse.contiguous(), entropy, total, *arguments, **constants
        )
    return Entropy(entropy, total)


def attention_column_mass(given: Columns) -> Mass:
    """See ``reference``."""
    query, key, lse = given.query, given.key, given.lse
    batch, heads = query.shape[:2]
    mass = query.new_empty(batch, heads, key.shape[2], dtype=torch.float32)
    if mass.numel():
        arguments, constants = _arguments("columns", given)
        column_mass_kernel[triton.cdiv(key.shape[2], constants["TILE_KEYS"]), heads, batch](
            query, key, lse.contiguous(), mass, given.first_query, *arguments, **constants
        )
    return Mass(mass)


def block_pooled_attention(given: Blocks) -> Pooled:
    """See ``reference``."""
    query, key, height, width = given.query, given.key, given.height, given.width
    batch, heads, queries, _ = query.shape
    rows, columns = triton.cdiv(queries, height), triton.cdiv(key.shape[2], width)
    pooled = query.new_zeros(batch, heads, rows, columns, dtype=torch.float32)
    if pooled.numel():
        arguments, constants = _arguments("pool", given)
        for name, size in (("TILE_QUERIES", height), ("TILE_KEYS", width)):
            constants[name] = min(constants[name], max(16, triton.next_power_of_2(size)))
        pool_kernel[rows, heads, batch](
            query,
            key,
            given.lse.contiguous(),
            pooled,
            *arguments,
            height,
            width,
            LARGEST=given.largest,
            **constants,
        )
    return Pooled(pooled)


def attention_lse_backward(
    given: Queries, results: LogSumExp, grads: LogSumExp, _: Needed
) -> dict[str, Tensor]:
    """Gradients of query and key."""
    return _backward(given, results.lse, grads.lse, None)


def attention_entropy_backward(
    given: Rows, results: Entropy, grads: Entropy, _: Needed
) -> dict[str, Tensor]:
    """Gradients of query and key."""
    return _backward(given, given.lse, *upstream_of_entropy(grads.entropy, results))


def _backward(
    given: Queries | Rows, lse: Tensor, offset: Tensor, slope: Tensor | None
) -> dict[str, Tensor]:
    """Gradients of query and key for ``p_ij * (offset_i + slope_i * log p_ij)`` of the scores."""
    query, key = given.query, given.key
    grad_query, grad_key = (
        torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key)
    )
    if lse.numel() and key.numel():
        offset = offset.contiguous()
        rows = lse.contiguous(), offset, offset if slope is None else slope.contiguous()
        arguments, constants = _arguments("query", given)
        query_gradient_kernel[_grid(query, constants["TILE_QUERIES"])](
            query, key, *rows, grad_query, *arguments, SLOPED=slope is not None, **constants
        )
        arguments, constants = _arguments("key", given)
        key_gradient_kernel[_grid(key, constants["TILE_KEYS"])](
            query, key, *rows, grad_key, *arguments, SLOPED=slope is not None, **constants
        )
    return {"query": grad_query, "key": grad_key}


def _grid(tensor: Tensor, tile: int) -> tuple[int, int, int]:
    """A program for each tile of rows of each head."""
    batch, heads, length, _ = tensor.shape
    return triton.cdiv(length, tile), heads, batch


def _arguments(
    kernel: str, given: Queries | Rows | Columns | Blocks
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What all kernels take: sizes, strides and scale, and constants."""
    query, key = given.query, given.key
    heads, features = query.shape[1], query.shape[3]
    sizes = heads, heads // key.shape[1], query.shape[2], key.shape[2], features
    padded = max(16, triton.next_power_of_2(features))
    arch = _triton.architecture(query.device)
    queries, keys, warps, stages = TILES[kernel].choose(arch, query.dtype, padded)
    constants = {
        "IS_CAUSAL": given.is_causal,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "INTERPRETED": _triton.INTERPRETED,
        "TILE_QUERIES": queries,
        "TILE_KEYS": keys,
        "FEATURES": padded,
        "num_warps": 1 if _triton.INTERPRETED else warps,
        "num_stages": stages,
    }
    return (sizes, query.stride(), key.stride(), scale_of(given)), constants
