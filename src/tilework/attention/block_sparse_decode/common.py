"""What implementations of block-sparse decoding take and give."""

import math
from typing import NamedTuple

from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.attention.block_sparse.common import pair_operations


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


def operations(given: Decoding) -> int:
    """Those of the two products with the selected tokens; at most so many without values."""
    query, table = given.query, given.block_table
    if given.kv_indices is not None:
        listed, unit = given.kv_num_blocks, given.block_size
        most = given.kv_indices.shape[-1]
    else:
        listed, unit = given.seq_lengths, 1
        most = given.key_cache.shape[1] * (1 if table is None else table.shape[1])
    rows = math.prod(query.shape[:3])
    if listed is not None and listed.numel() and _checks.has_values(listed):
        selected = unit * int(listed.sum()) * rows // listed.numel()
    else:
        selected = unit * most * rows
    return selected * pair_operations(query.shape[-1], given.value_cache.shape[-1])
