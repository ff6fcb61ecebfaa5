"""What implementations of reductions of the map of attention take and give."""

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor


class Queries(NamedTuple):
    """The arguments of the log-sum-exp; those of all others have these names too."""

    query: Tensor
    key: Tensor
    is_causal: bool
    scale: float | None
    implementation: str


class Rows(NamedTuple):
    """The arguments of the entropy, of the map under a log-sum-exp."""

    query: Tensor
    key: Tensor
    lse: Tensor
    is_causal: bool
    scale: float | None
    implementation: str


class Columns(NamedTuple):
    """The arguments of the column mass."""

    query: Tensor
    key: Tensor
    lse: Tensor
    first_query: int
    is_causal: bool
    scale: float | None
    implementation: str


class Blocks(NamedTuple):
    """The arguments of pooled blocks of ``height`` queries and ``width`` keys."""

    query: Tensor
    key: Tensor
    lse: Tensor
    height: int
    width: int
    largest: bool
    is_causal: bool
    scale: float | None
    implementation: str


class LogSumExp(NamedTuple):
    """The log-sum-exp of the scores of each query."""

    lse: Tensor


class Entropy(NamedTuple):
    """The entropy of each row of the map, and its sum, which is 1 for the exact log-sum-exp."""

    entropy: Tensor
    total: Tensor


class Mass(NamedTuple):
    """The sum of each column."""

    mass: Tensor


class Pooled(NamedTuple):
    """The largest entry of each block, or the sum of its entries."""

    pooled: Tensor


def operations(given: Queries | Rows | Columns | Blocks) -> int:
    """Those of the scores; the gradient of either factor has as many."""
    return 2 * given.query.numel() * given.key.shape[2]


def backward_operations(given: Queries | Rows, needed: Collection[str]) -> int:
    """Those of the scores, which are computed anew, and of the gradients."""
    return (1 + len(needed)) * operations(given)


def upstream_of_entropy(grad: Tensor, results: Entropy) -> tuple[Tensor, Tensor]:
    """The offset and the slope of the gradients of scores, for the gradient of the entropy."""
    # The exact log-sum-exp has the slope p / total, so that a row's gradients add up to 0.
    entropy, total = results
    return -grad * (entropy / total).masked_fill(total == 0, 0), -grad
