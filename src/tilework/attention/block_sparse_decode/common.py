"""What implementations of block-sparse decoding take and give."""

from typing import NamedTuple

from torch import Tensor

from tilework._operators import computation_dtype


class Decoding(NamedTuple):
    """The arguments.

    The caches are pages ``(num_pages, page_size, Hkv, E)``; token ``t`` of sequence ``b`` lies in
    page ``block_table[b, t // page_size]``. Without a table, page ``b`` is the whole sequence.
    Without ``seq_lengths`` the pages are full, without ``kv_indices`` all tokens are selected.
    """

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor | None
    seq_lengths: Tensor | None
    kv_indices: Tensor | None
    kv_num_blocks: Tensor | None
    block_size: int
    scale: float | None
    implementation: str


class Decoded(NamedTuple):
    """The output, in the query's dtype, and the log-sum-exp."""

    output: Tensor
    lse: Tensor


def empty_results(given: Decoding) -> Decoded:
    """Contiguous tensors."""
    query = given.query
    shape, dtype = query.shape[:3], computation_dtype(query.dtype)
    output = query.new_empty(*shape, given.value_cache.shape[-1])
    return Decoded(output, query.new_empty(shape, dtype=dtype))
