"""What attention's kernels share: tiles of rows, and scores. Only ``triton.py`` files import it."""

import math

import triton
import triton.language as tl

from tilework import _triton

LOG2_E = tl.constexpr(math.log2(math.e))
MAX_FEATURES = 256


@triton.jit
def tile(pointer, rows, row_mask, features, num_features, stride_row, stride_feature):
    """Rows with their features, zeros outside; rows are offsets in 64 bits times their stride."""
    offsets = rows.to(tl.int64)[:, None] * stride_row + features[None, :] * stride_feature
    mask = row_mask[:, None] & (features < num_features)[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0)


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
