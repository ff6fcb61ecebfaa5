"""The operators that reduce the map of attention and how they differentiate.

The log-sum-exp and the entropy have gradients of one form: that of score ``s_ij`` is ``p_ij *
(offset_i + slope_i * log p_ij)``. Pooled blocks and columns are constants.
"""

from typing import Any

from torch import Tensor

from tilework import _operators
from tilework._operators import computation_dtype
from tilework.attention._attention_map import reference
from tilework.attention._attention_map.common import (
    Blocks,
    Columns,
    Entropy,
    LogSumExp,
    Mass,
    Pooled,
    Queries,
    Rows,
    backward_operations,
    operations,
)


def refusal(features: int) -> str | None:
    """Why the kernels do not take so many features, if they do not."""
    from tilework.attention._attention_map import triton

    reason: str | None = triton.refusal(features)
    return reason


def _empty(query: Tensor, *sizes: int) -> Tensor:
    return query.new_empty(*query.shape[:2], *sizes, dtype=computation_dtype(query.dtype))


def _lse_fake(given: Queries) -> LogSumExp:
    return LogSumExp(_empty(given.query, given.query.shape[2]))


def _entropy_fake(given: Rows) -> Entropy:
    queries = given.query.shape[2]
    return Entropy(_empty(given.query, queries), _empty(given.query, queries))


def _column_mass_fake(given: Columns) -> Mass:
    return Mass(_empty(given.query, given.key.shape[2]))


def _block_pooled_fake(given: Blocks) -> Pooled:
    rows, columns = -(-given.query.shape[2] // given.height), -(-given.key.shape[2] // given.width)
    return Pooled(_empty(given.query, rows, columns))


def _no_gradient(*_: Any) -> dict[str, Tensor]:
    return {}


attention_lse = _operators.define_pair(
    "attention_lse",
    Queries,
    LogSumExp,
    _lse_fake,
    reference=reference.attention_lse,
    rooms=__package__,
    forward="attention_lse",
    backward="attention_lse_backward",
    differentiable=("query", "key"),
    saved=("query", "key", "lse"),
    operations=operations,
    backward_operations=backward_operations,
)
attention_entropy = _operators.define_pair(
    "attention_entropy",
    Rows,
    Entropy,
    _entropy_fake,
    reference=reference.attention_entropy,
    rooms=__package__,
    forward="attention_entropy",
    backward="attention_entropy_backward",
    differentiable=("query", "key"),
    saved=("query", "key", "lse", "entropy", "total"),
    constant=("total",),
    operations=operations,
    backward_operations=backward_operations,
)
attention_column_mass = _operators.or_reference(
    _operators.define(
        "attention_column_mass",
        Columns,
        Mass,
        _operators.of_rooms(__package__, "attention_column_mass"),
        _column_mass_fake,
        derivative=_no_gradient,
        constant=("mass",),
        operations=operations,
    ),
    reference.attention_column_mass,
)
block_pooled_attention = _operators.or_reference(
    _operators.define(
        "block_pooled_attention",
        Blocks,
        Pooled,
        _operators.of_rooms(__package__, "block_pooled_attention"),
        _block_pooled_fake,
        derivative=_no_gradient,
        constant=("pooled",),
        operations=operations,
    ),
    reference.block_pooled_attention,
)
