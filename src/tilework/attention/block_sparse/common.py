"""What implementations of block-sparse attention take and give."""

from typing import NamedTuple

from torch import Tensor

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
