"""The operator of block-sparse attention and how it differentiates."""

from typing import Any, NoReturn

from torch import Tensor

from tilework import _operators
from tilework.attention.block_sparse import reference
from tilework.attention.block_sparse.common import (
    Attended,
    Attention,
    empty_gradient,
    empty_results,
    operations,
)


def refusal(block_size: tuple[int, int], features: int, values: int) -> str | None:
    """Why the kernels do not take these sizes, if they do not."""
    from tilework.attention.block_sparse import triton

    reason: str | None = triton.refusal(block_size, features, values)
    return reason


def _empty_gradient(given: Any, leaf: Tensor) -> Tensor:
    return empty_gradient(leaf, given.query_starts is not None)


def _refuse(given: Any, *_: Any) -> NoReturn:
    raise NotImplementedError(
        f"block_sparse_attention: implementation={given.implementation!r} has no second "
        "derivative; 'reference' has"
    )


_LISTS = "kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices", "query_starts", "key_starts"
attention = _operators.define_pair(
    "block_sparse_attention",
    Attention,
    Attended,
    empty_results,
    reference=reference.forward,
    rooms=__package__,
    differentiable=("query", "key", "value"),
    saved=("query", "key", "value", "output", "lse", *_LISTS),
    empty_gradient=_empty_gradient,
    second_derivative=_refuse,
    operations=operations,
    backward_operations=operations,
)
