"""Block-sparse attention in plain PyTorch: gathered blocks and batched matrix products.

A *row* is a block of queries with its list of key blocks; heads of a group with one list are
one row. Rows of similar length are computed together, their lists aligned at the right: there lies
what the diagonal and the last keys cut off, and at the left what shorter rows lack.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework._operators import computation_dtype

SCORES = 2**20  # scores at a time: 4 MiB in float32, which stay in a CPU's cache


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_num_blocks: Tensor | None,
    q_indices: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    block_size: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See ``reference.block_sparse_attention``."""
    grid = _Grid(
        query, key, kv_num_blocks, kv_indices, query_starts, key_starts, block_size, is_causal
    )
    queries = grid.rows_of(query).mul_(scale)
    keys, values = grid.blocks_of(key), grid.blocks_of(value)
    output = queries.new_zeros(*queries.shape[:2], value.shape[-1])
    lse = queries.new_full(queries.shape[:2], -torch.inf)
    for batch in grid.batches():
        scores = batch.scores(queries, keys)
        peak = scores.amax(-1, keepdim=True)
        if batch.may_be_blind:
            peak = peak.where(peak != -torch.inf, 0)
        weights = scores.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)
        result = weights @ batch.gather(values)
        lse.index_copy_(0, batch.rows, (peak + total.log())[..., 0])
        if batch.may_be_blind:
            total = total.where(total != 0, 1)
        output.index_copy_(0, batch.rows, result.div_(total))
    return grid.from_rows(output, query.dtype), grid.from_rows(lse[..., None], lse.dtype)[..., 0]


def backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_num_blocks: Tensor | None,
    q_indices: Tensor | None,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    block_size: list[int],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    grid = _Grid(
        query, key, kv_num_blocks, kv_indices, query_starts, key_starts, block_size, is_causal
    )
    queries = grid.rows_of(query).mul_(scale)
    keys, values = grid.blocks_of(key), grid.blocks_of(value)
    grad_outputs = grid.rows_of(grad_output)
    dtype = queries.dtype
    offset = (grad_output.to(dtype) * output.to(dtype)).sum(-1) - grad_lse
    offsets = grid.rows_of(offset[..., None])
    shifts = grid.rows_of(lse.masked_fill(lse == -torch.inf, 0)[..., None])
    grad_queries = torch.zeros_like(queries)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    for batch in grid.batches():
        weights = batch.scores(queries, keys).sub_(shifts[batch.rows]).exp_()
        upstream = grad_outputs[batch.rows]
        batch.scatter_add_(grad_values, weights.mT @ upstream)
        grad_scores = upstream @ batch.gather(values).mT
        grad_scores.sub_(offsets[batch.rows]).mul_(weights)
        grad_queries.index_copy_(0, batch.rows, grad_scores @ batch.gather(keys))
        batch.scatter_add_(grad_keys, grad_scores.mT @ queries[batch.rows])
    return (
        grid.from_rows(grad_queries.mul_(scale), query.dtype),
        grid.from_blocks(grad_keys, key),
        grid.from_blocks(grad_values, value),
    )


class _Batch(NamedTuple):
    """Rows that are computed together, and what of their blocks they do not see."""

    rows: Tensor  # (R,)
    blocks: Tensor  # (R, W): a shorter row repeats its first block at the left
    repeated: Tensor  # (R, 1, 1, keys): of the keys at the left, those of repeated blocks
    cut: Tensor  # (R, 1, queries, keys): of the keys at the right, those that a query does not see
    may_be_blind: bool  # whether a query may see no key

    def gather(self, blocks: Tensor) -> Tensor:
        """The keys or values of each row."""
        chosen = blocks.index_select(0, self.blocks.flatten())
        return chosen.view(len(self.rows), -1, blocks.shape[-1])

    def scatter_add_(self, blocks: Tensor, values: Tensor) -> None:
        """Add what belongs to the keys or values of each row to their blocks."""
        blocks.index_add_(0, self.blocks.flatten(), values.view(-1, *blocks.shape[1:]))

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The scores of each row, -inf where a key is not seen."""
        scores = queries[self.rows] @ self.gather(keys).mT
        by_head = scores.view(len(self.rows), -1, self.cut.shape[2], scores.shape[-1])
        by_head[..., : self.repeated.shape[-1]].masked_fill_(self.repeated, -torch.inf)
        first = scores.shape[-1] - self.cut.shape[-1]
        by_head[..., first:].masked_fill_(self.cut, -torch.inf)
        return scores


class _Grid:
    """The rows of queries, the blocks of keys, and which rows see which blocks."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        query_starts: Tensor | None,
        key_starts: Tensor | None,
        block_size: list[int],
        is_causal: bool,
    ) -> None:
        self._height, self._width = block_size
        self._is_causal = is_causal
        self._batch, heads = query.shape[:2]
        self._kv_heads = key.shape[1]
        self._rows = _Blocks(query, self._height, query_starts)
        self._columns = _Blocks(key, self._width, key_starts)
        # Heads of a group are one row, unless each has a list of its own.
        self._lists = heads if kv_num_blocks.shape[1] == heads else self._kv_heads
        self._group = heads // max(1, self._lists)

        shape = self._batch, self._lists, self._rows.count
        kv_num_blocks, kv_indices = (self._rows.lists(t) for t in (kv_num_blocks, kv_indices))
        self._first_query, queries, self._num_keys, first_block = (
            values.expand(shape).reshape(-1)
            for values in (
                self._rows.first,
                self._rows.length,
                self._columns.lengths[self._rows.sequence],
                self._columns.starts[self._rows.sequence],
            )
        )
        head = torch.arange(self._lists, device=query.device)[:, None] // max(
            1, self._lists // max(1, self._kv_heads)
        )
        kv_head = torch.arange(self._batch, device=query.device)[:, None, None] * self._kv_heads
        first_head = ((kv_head + head) * self._columns.count).expand(shape).reshape(-1)
        self._first_block = first_head + first_block
        rows = len(self._first_query)
        indices = kv_indices.expand(*shape, -1).reshape(rows, kv_indices.shape[-1]).long()
        listed = torch.arange(indices.shape[1], device=query.device) < (
            kv_num_blocks.expand(shape).reshape(rows, 1)
        )
        end = self._num_keys
        if is_causal:
            end = torch.minimum(torch.minimum(self._first_query + self._height, queries), end)
        listed &= indices * self._width < end[:, None]
        self._indices, self._counts = indices, listed.sum(1)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """Queries, or what they have, as (rows, group * queries of a block, features)."""
        features = tensor.shape[-1]
        rows = self._rows.pad(tensor.to(computation_dtype(tensor.dtype))).reshape(
            self._batch, self._lists, self._group, self._rows.count, self._height, features
        )
        shape = len(self._counts), self._group * self._height, features
        return rows.transpose(2, 3).reshape(shape).clone()

    def from_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of :meth:`rows_of`."""
        features = rows.shape[-1]
        tensor = rows.view(
            self._batch, self._lists, self._rows.count, self._group, self._height, features
        ).transpose(2, 3)
        shape = self._batch, self._lists * self._group, self._rows.count * self._height, features
        return self._rows.cut(tensor.reshape(shape), dtype)

    def blocks_of(self, tensor: Tensor) -> Tensor:
        """Keys or values as (batch * heads * blocks, keys of a block, features)."""
        padded = self._columns.pad(tensor.to(computation_dtype(tensor.dtype)))
        blocks = self._batch * self._kv_heads * self._columns.count
        return padded.reshape(blocks, self._width, tensor.shape[-1])

    def from_blocks(self, blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`blocks_of`."""
        shape = *like.shape[:2], self._columns.count * self._width, like.shape[-1]
        return self._columns.cut(blocks.view(shape), like.dtype)

    def batches(self) -> Iterator[_Batch]:
        """The rows that see something, the shortest first."""
        counts, order = self._counts.sort(stable=True)
        lengths = counts.tolist()
        end = len(lengths)
        while end > 0 and lengths[end - 1] > 0:
            size = self._group * self._height * self._width * lengths[end - 1]
            start = max(0, end - max(1, SCORES // size))
            while lengths[start] == 0:
                start += 1
            yield self._gathered(order[start:end], lengths[start], lengths[end - 1])
            end = start

    def _gathered(self, rows: Tensor, shortest: int, longest: int) -> _Batch:
        device = rows.device
        slot = self._counts[rows, None] - longest + torch.arange(longest, device=device)
        indices = self._indices[rows].gather(1, slot.clamp(min=0))
        repeated = (slot[:, : longest - shortest] < 0).repeat_interleave(self._width, 1)

        within = torch.arange(self._width, device=device)
        keys = (
            indices[:, longest - self._cut_blocks(longest) :, None] * self._width + within
        ).view(len(rows), 1, -1)
        queries = self._first_query[rows, None, None] + torch.arange(
            self._height, device=device
        ).view(-1, 1)
        cut = (keys >= self._num_keys[rows, None, None]).expand(-1, self._height, -1)
        may_be_blind = False
        if self._is_causal:
            cut = cut | (keys > queries)
            may_be_blind = bool((indices[:, 0] * self._width > self._first_query[rows]).any())
        blocks = indices + self._first_block[rows, None]
        return _Batch(rows, blocks, repeated[:, None, None], cut[:, None], may_be_blind)

    def _cut_blocks(self, longest: int) -> int:
        """How many blocks at the right of a list may be seen in part."""
        short = int(self._columns.may_be_short)
        if not self._is_causal:
            return min(longest, short)
        if self._width % self._height == 0:
            return 1
        whole = self._height % self._width == 0
        return min(longest, self._height // self._width + (0 if whole else 2))


class _Blocks:
    """The blocks of queries or of keys, each of one sequence, and how positions get there."""

    def __init__(self, tensor: Tensor, size: int, starts: Tensor | None) -> None:
        self._length, device = tensor.shape[2], tensor.device
        if starts is None:
            self._places = None
            self._missing = -self._length % size
            self.may_be_short = self._missing > 0
            self.count = -(-self._length // size)
            self.lengths = torch.full((1,), self._length, device=device)
            self.starts = torch.zeros_like(self.lengths)
            self.sequence = torch.zeros(self.count, dtype=torch.long, device=device)
        else:
            self.may_be_short = True
            starts = starts.long()
            self.lengths = starts.diff()
            counts = (self.lengths + size - 1) // size
            self.starts = counts.cumsum(0) - counts
            self.count = int(counts.sum())
            sequences = torch.arange(len(counts), device=device)
            self.sequence = sequences.repeat_interleave(counts)
            token = sequences.repeat_interleave(self.lengths)
            self._places = (self.starts * size - starts[:-1])[token]
            self._places += torch.arange(len(token), device=device)
        self._whole = self.count * size
        self._local = torch.arange(self.count, device=device) - self.starts[self.sequence]
        self.first = self._local * size  # position of a block's first row in its sequence
        self.length = self.lengths[self.sequence]

    def lists(self, lists: Tensor) -> Tensor:
        """Of the rows of a layout, (batch, heads, rows, …), those of these blocks."""
        if self._places is None:
            return lists
        sequence = self.sequence if len(lists) > 1 else torch.zeros_like(self.sequence)
        return lists[sequence, :, self._local].movedim(0, 1)[None]

    def pad(self, tensor: Tensor) -> Tensor:
        """Positions, the third dimension, in whole blocks with zeros."""
        if self._places is None:
            return F.pad(tensor, (0, 0, 0, self._missing))
        whole = tensor.new_zeros(*tensor.shape[:2], self._whole, tensor.shape[3])
        return whole.index_copy_(2, self._places, tensor)

    def cut(self, whole: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of :meth:`pad`; packed positions lie in the order of rows."""
        if self._places is None:
            return whole[:, :, : self._length].to(dtype).contiguous()
        rows = whole.transpose(1, 2).index_select(1, self._places)
        return rows.to(dtype).contiguous().transpose(1, 2)
