"""What attention's kernels share: tiles of rows, and scores. Only ``triton.py`` files import it."""

import math
from typing import NamedTuple

import triton
import triton.language as tl

from tilework import _triton

LOG2_E = tl.constexpr(math.log2(math.e))
MAX_FEATURES = 256


class Tile(NamedTuple):
    """Queries (of all heads) and keys of a tile at most, and warps and stages of a program."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


@triton.jit
def tile(pointer, rows, valid, num_features, stride_row, stride_feature, FEATURES: tl.constexpr):
    """Rows with their features, zeros outside."""
    features = tl.arange(0, FEATURES)
    offsets = rows.to(tl.int64)[:, None] * stride_row + features[None, :] * stride_feature
    mask = valid[:, None] & (features < num_features)[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit
def store(pointer, rows, valid, num_features, result):
    """Store rows with all their features in contiguous memory, rounded once."""
    features = tl.arange(0, result.shape[1])
    tl.store(
        pointer + rows[:, None] * num_features + features[None, :],
        result.to(pointer.dtype.element_ty),
        mask=valid[:, None] & (features < num_features)[None, :],
    )


@triton.jit
def scores(
    queries,
    keys,
    positions,
    columns,
    num_keys,
    factor,
    IS_CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Products of queries (rows) and keys (columns) times a factor, -inf where not seen."""
    result = tl.zeros((queries.shape[0], keys.shape[0]), dtype=tl.float32)
    result = _triton.dot(queries, tl.trans(keys), result, PRECISION, INTERPRETED)
    seen = (columns < num_keys)[None, :]
    if IS_CAUSAL:
        seen = seen & (columns[None, :] <= positions[:, None])
    return tl.where(seen, result * factor, float("-inf"))
