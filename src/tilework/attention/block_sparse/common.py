"""What implementations of block-sparse attention take and give."""

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype


class Attention(NamedTuple):
    """The arguments.

    ``kv_indices[b, h, i, :kv_num_blocks[b, h, i]]`` are the blocks of keys that block ``i`` of
    queries sees, in increasing order; ``q_num_blocks`` and ``q_indices`` are the transposed lists,
    for implementations that need them. Sizes of 1 for batch and heads stand for all; as many heads
    as keys have are those of each group of query heads. With ``query_starts`` and ``key_starts``,
    sequence ``s`` is the slice of positions from entry ``s`` to the next, the only element of the
    batch holds all of them, and the batch of the lists is that of sequences.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    kv_num_blocks: Tensor
    kv_indices: Tensor
    q_num_blocks: Tensor | None
    q_indices: Tensor | None
    query_starts: Tensor | None
    key_starts: Tensor | None
    block_size: list[int]
    is_causal: bool
    scale: float | None
    implementation: str


def pair_operations(features: int, values: int, needed: Collection[str] | None = None) -> int:
    """Those of a query and a key that meet: of a result, or of the gradients that are ``needed``.

    The scores, which are computed anew for gradients, count twice, as PyTorch counts them for
    fused attention.
    """
    if needed is None:
        return 2 * (features + values)
    of_scores = sum(name in needed for name in ("query", "key"))
    of_weights = values if of_scores else 0
    return 2 * (features + of_weights + of_scores * features + ("value" in needed) * values)


def operations(given: Attention, needed: Collection[str] | None = None) -> int:
    """Those of a result, or of the gradients that are ``needed``, over the layout's blocks."""
    pairs = _pairs(given.query, given.kv_num_blocks, given.kv_indices, given.query_starts)
    area = given.block_size[0] * given.block_size[1]
    return pairs * area * pair_operations(given.query.shape[-1], given.value.shape[-1], needed)


def _pairs(query: Tensor, counts: Tensor, indices: Tensor, starts: Tensor | None) -> int:
    """How many blocks meet in all heads; without values, the most that lists have room for."""
    blocks = int(counts.sum()) if _checks.has_values(counts) else indices.numel()
    batch, heads = query.shape[:2]
    copies = batch // len(counts) if starts is None else 1
    return blocks * copies * (heads // counts.shape[1])


class Attended(NamedTuple):
    """The output, in the query's dtype, and the log-sum-exp of each row."""

    output: Tensor
    lse: Tensor


def empty_results(given: Attention) -> Attended:
    """Of packed sequences, contiguous by rows."""
    query, packed = given.query, given.query_starts is not None
    output = query.new_empty(_shape(query, packed, given.value.shape[-1]))
    lse = query.new_empty(_shape(query, packed), dtype=computation_dtype(query.dtype))
    return Attended(*((t.transpose(1, 2) if packed else t) for t in (output, lse)))


def empty_gradient(tensor: Tensor, packed: bool) -> Tensor:
    """The gradient of query, key or value."""
    gradient = tensor.new_empty(_shape(tensor, packed, tensor.shape[-1]))
    return gradient.transpose(1, 2) if packed else gradient


def _shape(tensor: Tensor, packed: bool, *features: int) -> tuple[int, ...]:
    batch, heads, rows, _ = tensor.shape
    return (batch, rows, heads, *features) if packed else (batch, heads, rows, *features)
