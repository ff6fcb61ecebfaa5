"""Block-sparse attention in plain PyTorch: gathered blocks and batched matrix products.

A *row* is a block of queries with its list of key blocks; heads of a group with one list are
one row. Rows of similar length are computed together, their lists aligned at the right: there lies
what the diagonal and the last keys cut off, and at the left what shorter rows lack.
"""

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework._operators import Needed, computation_dtype
from tilework.attention._tensors import scale_of
from tilework.attention.block_sparse.common import Attended, Attention

SCORES = 2**18  # scores at a time for each thread; more of them fall out of its cache
FUSED = ("cpu",)  # where torch has a fused attention that returns the log-sum-exp, for every dtype


def forward(given: Attention) -> Attended:
    """See ``reference``."""
    query, key, value = given.query, given.key, given.value
    grid, scale = _Grid(given), scale_of(given)
    features = max(query.shape[-1], value.shape[-1])
    queries = grid.rows_of(query, features)
    keys, values = grid.blocks_of(key, features), grid.blocks_of(value, features)
    output = torch.zeros_like(queries)
    lse = queries.new_full(queries.shape[:2], -torch.inf)
    room = grid.room(keys), grid.room(values)
    for batch in grid.batches():
        result, log_sum = _attend(
            queries.index_select(0, batch.rows),
            batch.gather(keys, room[0]),
            batch.gather(values, room[1]),
            batch.mask,
            scale,
        )
        if batch.may_be_blind and batch.mask is not None:
            log_sum = log_sum.masked_fill((batch.mask == -torch.inf).all(-1), -torch.inf)
        output.index_copy_(0, batch.rows, result)
        lse.index_copy_(0, batch.rows, log_sum)
    return Attended(
        grid.from_rows(output[..., : value.shape[-1]], query.dtype),
        grid.from_rows(lse[..., None], lse.dtype)[..., 0],
    )


def backward(given: Attention, results: Attended, grads: Attended, _: Needed) -> dict[str, Tensor]:
    """Gradients of query, key and value."""
    query, key, value = given.query, given.key, given.value
    output, lse = results
    grid, scale = _Grid(given), scale_of(given)
    grad_output = torch.zeros_like(output) if grads.output is None else grads.output
    if grads.lse is not None and bool(grads.lse.any()):
        # One feature more, of which the values are 0, makes grad_output . output what it must be.
        grad_output = torch.cat([grad_output.to(lse.dtype), torch.ones_like(lse)[..., None]], -1)
        output = torch.cat([output.to(lse.dtype), -grads.lse[..., None]], -1)
    features = max(query.shape[-1], output.shape[-1])
    queries, outputs, upstream = (
        grid.rows_of(tensor, features) for tensor in (query, output, grad_output)
    )
    keys, values = grid.blocks_of(key, features), grid.blocks_of(value, features)
    log_sums = grid.rows_of(lse.masked_fill(lse == -torch.inf, 0)[..., None], 1)[..., 0]
    grad_queries = torch.zeros_like(queries)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    room = grid.room(keys), grid.room(values)
    for batch in grid.batches():
        above, asked, result, log_sum = (
            tensor.index_select(0, batch.rows) for tensor in (upstream, queries, outputs, log_sums)
        )
        found = _attend_backward(
            above,
            asked,
            batch.gather(keys, room[0]),
            batch.gather(values, room[1]),
            result,
            log_sum,
            batch.mask,
            scale,
        )
        grad_queries.index_copy_(0, batch.rows, found[0])
        batch.scatter_add_(grad_keys, found[1])
        batch.scatter_add_(grad_values, found[2])
    return {
        "query": grid.from_rows(grad_queries[..., : query.shape[-1]], query.dtype),
        "key": grid.from_blocks(grad_keys, key),
        "value": grid.from_blocks(grad_values, value),
    }


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense attention of each row to its keys, and the log-sum-exp.

    Queries that see no key have an output of 0 and any log-sum-exp.
    """
    if query.device.type in FUSED:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(tensor[:, None] for tensor in (query, key, value)),
            attn_mask=None if mask is None else mask[:, None],
            scale=scale,
        )
        output, lse = output[:, 0], lse[:, 0]
        rows = _spoiled(query, key)
        if len(rows):
            mask = mask if mask is None or len(mask) == 1 else mask[rows]
            output[rows], lse[rows] = _attend_by_products(
                query[rows], key[rows], value[rows], mask, scale
            )
        return output, lse
    return _attend_by_products(query, key, value, mask, scale)


def _attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    scores = _scores(query, key, mask, scale)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse == -torch.inf, 0)
    return scores.sub_(lse[..., None]).exp_() @ value, lse


def _attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of :func:`_attend`."""
    if query.device.type in FUSED:
        tensors = (grad_output, query, key, value, output, lse)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(tensor[:, None] for tensor in tensors),
            0.0,
            False,
            attn_mask=None if mask is None else mask[:, None],
            scale=scale,
        )
        found = grads[0][:, 0], grads[1][:, 0], grads[2][:, 0]
        rows = _spoiled(query, key)
        if len(rows):
            mask = mask if mask is None or len(mask) == 1 else mask[rows]
            above, asked, keys, values, result, log_sum = (tensor[rows] for tensor in tensors)
            spoiled = _differentiate_products(
                above, asked, keys, values, result, log_sum, mask, scale
            )
            for whole, part in zip(found, spoiled, strict=True):
                whole[rows] = part
        return found
    return _differentiate_products(grad_output, query, key, value, output, lse, mask, scale)


def _differentiate_products(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _scores(query, key, mask, scale).sub_(lse[..., None]).exp_()
    slope = (grad_output @ value.mT).sub_((grad_output * output).sum(-1, keepdim=True))
    slope.mul_(weights).mul_(scale)
    return slope @ key, slope.mT @ query, weights.mT @ grad_output


def _spoiled(query: Tensor, key: Tensor) -> Tensor:
    """The rows that torch's fused attention does not compute as they are defined.

    It adds its mask, which leaves scores that are nan or infinite where they are hidden.
    """
    return (query.sum((1, 2)) + key.sum((1, 2))).isfinite().logical_not().nonzero()[:, 0]


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = (query @ key.mT).mul_(scale)
    return scores if mask is None else scores.masked_fill_(mask != 0, -torch.inf)


class _Batch(NamedTuple):
    """Rows that are computed together."""

    rows: Tensor  # (R,)
    blocks: Tensor  # (R, W): a shorter row repeats its first block at the left
    mask: Tensor | None  # (R or 1, queries, keys): -inf where a query does not see a key, else 0
    may_be_blind: bool  # whether a query may see no key

    def gather(self, blocks: Tensor, room: Tensor) -> Tensor:
        """The keys or values of each row, in ``room`` until the next batch."""
        chosen = room[: self.blocks.numel()]
        torch.index_select(blocks, 0, self.blocks.flatten(), out=chosen)
        return chosen.view(len(self.rows), -1, blocks.shape[-1])

    def scatter_add_(self, blocks: Tensor, values: Tensor) -> None:
        """Add what belongs to the keys or values of each row to their blocks."""
        blocks.index_add_(0, self.blocks.flatten(), values.reshape(-1, *blocks.shape[1:]))


class _Grid:
    """The rows of queries, the blocks of keys, and which rows see which blocks."""

    def __init__(self, given: Attention) -> None:
        query, key, is_causal = given.query, given.key, given.is_causal
        kv_num_blocks, kv_indices = given.kv_num_blocks, given.kv_indices
        self._block_size = self._height, self._width = given.block_size
        self._dtype = computation_dtype(query.dtype)
        self._is_causal = is_causal
        self._batch, heads = query.shape[:2]
        self._kv_heads = key.shape[1]
        self._rows = _Blocks(query, self._height, given.query_starts)
        self._columns = _Blocks(key, self._width, given.key_starts)
        # Heads of a group are one row, unless each has a list of its own.
        self._lists = heads if kv_num_blocks.shape[1] == heads else self._kv_heads
        self._group = heads // max(1, self._lists)
        scores = max(1, self._group * self._height * self._width)
        self._blocks_at_once = torch.get_num_threads() * SCORES // scores

        shape = self._batch, self._lists, self._rows.count
        kv_num_blocks, kv_indices = (self._rows.lists(t) for t in (kv_num_blocks, kv_indices))
        first_query, queries, num_keys, first_block = (
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
        rows = len(first_query)
        indices = kv_indices.expand(*shape, -1).reshape(rows, kv_indices.shape[-1]).long()
        listed = torch.arange(indices.shape[1], device=query.device) < (
            kv_num_blocks.expand(shape).reshape(rows, 1)
        )
        end = num_keys
        if is_causal:
            end = torch.minimum(torch.minimum(first_query + self._height, queries), end)
        listed &= indices * self._width < end[:, None]

        # The shortest lists first; each ends at the right.
        self._counts, self._order = listed.sum(1).sort(stable=True)
        self._lengths = self._counts.tolist()
        longest = max(self._lengths, default=0)
        slot = self._counts[:, None] - longest + torch.arange(longest, device=query.device)
        indices = indices[self._order].gather(1, slot.clamp(min=0))
        self._blocks = indices + (first_head + first_block)[self._order, None]
        self._find_edges(
            indices * self._width, first_query[self._order, None], num_keys[self._order, None]
        )

    def _find_edges(self, starts: Tensor, first_query: Tensor, num_keys: Tensor) -> None:
        """Find out what the blocks at the right, of which ``starts`` are the first keys, hide."""
        # Query i of a row sees the keys of a block before an end, and before the diagonal + i.
        longest = starts.shape[1]
        last = starts[:, longest - self._cut_blocks(longest) :]
        end = (num_keys - last).clamp_max(self._width)
        diagonal = first_query + 1 - last if self._is_causal else end
        self._edges = torch.stack([end, diagonal.clamp(1 - self._height, self._width)], 1)
        # Neighbors of one kind have the same edges.
        changes = (self._edges.diff(dim=0) != 0).flatten(1).any(1)
        self._kinds = F.pad(changes.cumsum(0), (1, 0)).tolist()
        self._last_mask: tuple[object, Tensor | None] = None, None
        self._blind = ((starts[:, :1] > first_query) & self._is_causal).any(1).tolist()

    def rows_of(self, tensor: Tensor, features: int) -> Tensor:
        """Queries, or what they have, as (rows, group * queries of a block, features)."""
        rows = self._rows.pad(tensor.to(self._dtype), features).reshape(
            self._batch, self._lists, self._group, self._rows.count, self._height, features
        )
        shape = len(self._order), self._group * self._height, features
        return rows.transpose(2, 3).reshape(shape)

    def from_rows(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of :meth:`rows_of`."""
        features = rows.shape[-1]
        tensor = rows.view(
            self._batch, self._lists, self._rows.count, self._group, self._height, features
        ).transpose(2, 3)
        shape = self._batch, self._lists * self._group, self._rows.count * self._height, features
        return self._rows.cut(tensor.reshape(shape), dtype)

    def blocks_of(self, tensor: Tensor, features: int) -> Tensor:
        """Keys or values as (batch * heads * blocks, keys of a block, features)."""
        padded = self._columns.pad(tensor.to(self._dtype), features)
        blocks = self._batch * self._kv_heads * self._columns.count
        return padded.reshape(blocks, self._width, features)

    def from_blocks(self, blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`blocks_of`."""
        shape = *like.shape[:2], self._columns.count * self._width, blocks.shape[-1]
        return self._columns.cut(blocks.view(shape)[..., : like.shape[-1]], like.dtype)

    def room(self, blocks: Tensor) -> Tensor:
        """Memory for the keys or values of any batch; fresh memory costs more than the copy."""
        most = max(self._blocks_at_once, self._blocks.shape[1])
        return blocks.new_empty(min(most, self._blocks.numel()), *blocks.shape[1:])

    def batches(self) -> Iterator[_Batch]:
        """The rows that see something, the longest lists first."""
        lengths = self._lengths
        end = len(lengths)
        while end > 0 and lengths[end - 1] > 0:
            start = max(0, end - max(1, self._blocks_at_once // lengths[end - 1]))
            # Rows of one length need no mask at the left.
            longest = max(start, bisect_left(lengths, lengths[end - 1]))
            if 2 * (end - longest) >= end - start:
                start = longest
            while lengths[start] == 0:
                start += 1
            yield self._batch_of(start, end)
            end = start

    def _batch_of(self, first: int, stop: int) -> _Batch:
        longest = self._lengths[stop - 1]
        blocks = self._blocks[first:stop, self._blocks.shape[1] - longest :]
        mask, may_be_blind = self._mask(first, stop), any(self._blind[first:stop])
        return _Batch(self._order[first:stop], blocks, mask, may_be_blind)

    def _mask(self, first: int, stop: int) -> Tensor | None:
        shortest, longest = self._lengths[first], self._lengths[stop - 1]
        edges = self._edges[first:stop, :, -self._cut_blocks(longest) :]
        if shortest == longest and edges.shape[2] == 0:
            return None
        kind = None
        if shortest == longest and self._kinds[first] == self._kinds[stop - 1]:
            edges = edges[:1]  # as where each row ends with the diagonal
            kind = longest, self._kinds[first]
            if kind == self._last_mask[0]:
                return self._last_mask[1]
        end, diagonal = edges[..., None, None].unbind(1)
        query, key = (torch.arange(size, device=edges.device) for size in self._block_size)
        cut = (key >= torch.minimum(end, diagonal + query[:, None])).transpose(1, 2).flatten(2)
        missing = longest - self._counts[first:stop, None]
        repeated = torch.arange(longest - shortest, device=edges.device) < missing
        repeated = repeated.repeat_interleave(self._width, 1)[: len(cut), None]

        keys = longest * self._width
        mask = torch.zeros(len(cut), self._height, keys, dtype=self._dtype, device=cut.device)
        mask[..., : repeated.shape[2]].masked_fill_(repeated, -torch.inf)
        mask[..., keys - cut.shape[2] :].masked_fill_(cut, -torch.inf)
        mask = mask.repeat(1, self._group, 1)
        self._last_mask = kind, mask
        return mask

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

    def pad(self, tensor: Tensor, features: int) -> Tensor:
        """Positions, the third dimension, in whole blocks, and features, filled up with zeros."""
        given = tensor.shape[3]
        if self._places is None:
            missing = (0, features - given, 0, self._missing)
            return F.pad(tensor, missing) if any(missing) else tensor
        whole = tensor.new_zeros(*tensor.shape[:2], self._whole, features)
        whole[..., :given].index_copy_(2, self._places, tensor)
        return whole

    def cut(self, whole: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of :meth:`pad`; packed positions lie in the order of rows."""
        if self._places is None:
            return whole[:, :, : self._length].to(dtype).contiguous()
        rows = whole.transpose(1, 2).index_select(1, self._places)
        return rows.to(dtype).contiguous().transpose(1, 2)
