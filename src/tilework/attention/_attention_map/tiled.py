"""Reductions of the map of attention in plain PyTorch, a tile of scores at a time.

A *plane* is a head of keys of an element of the batch; it has the queries of all heads of its
group, so that keys are not repeated.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework._operators import Needed, computation_dtype
from tilework.attention._attention_map.common import (
    Blocks,
    Columns,
    Entropy,
    LogSumExp,
    Mass,
    Pooled,
    Queries,
    Rows,
    upstream_of_entropy,
)
from tilework.attention._tensors import scale_of

SCORES = 2**20  # scores at a time: 4 MiB in float32, which stay in a CPU's cache
QUERIES, KEYS = 128, 512  # of each head of a plane, at a time

Index = tuple[slice, slice, slice]


def attention_lse(given: Queries) -> LogSumExp:
    """See ``reference``."""
    planes = _Planes(given, None)
    peak, total = planes.per_query(-torch.inf), planes.per_query(0.0)
    for tile in planes.tiles():
        scores = planes.scores(tile)
        old = peak[tile.queries]
        new = torch.maximum(old, scores.amax(-1))
        base = _finite(new)
        weights = scores.sub_(base[..., None]).exp_().sum(-1)
        total[tile.queries] = total[tile.queries] * (old - base).exp_() + weights
        peak[tile.queries] = new
    return LogSumExp(total.log_().add_(_finite(peak)).view(given.query.shape[:3]))


def attention_entropy(given: Rows) -> Entropy:
    """See ``reference``."""
    planes = _Planes(given, given.lse)
    entropy, total = planes.per_query(0.0), planes.per_query(0.0)
    for tile in planes.tiles():
        weights, logs = planes.weights_and_logs(tile)
        total[tile.queries] += weights.sum(-1)
        entropy[tile.queries] -= logs.mul_(weights).sum(-1)
    shape = given.query.shape[:3]
    return Entropy(entropy.view(shape), total.view(shape))


def attention_column_mass(given: Columns) -> Mass:
    """See ``reference``."""
    planes = _Planes(given, given.lse)
    keys = given.key.shape[2]
    mass = planes.queries.new_zeros(*planes.queries.shape[:2], keys)
    for tile in planes.tiles(first_query=given.first_query):
        mass[tile.of_keys] += planes.logs(tile).exp_().sum(-2)
    return Mass(mass.view(*given.query.shape[:2], keys))


def block_pooled_attention(given: Blocks) -> Pooled:
    """See ``reference``."""
    planes = _Planes(given, given.lse)
    height, width, largest = given.height, given.width, given.largest
    shape = -(-given.query.shape[2] // height), -(-given.key.shape[2] // width)
    pooled = planes.queries.new_zeros(*planes.queries.shape[:2], *shape)
    for tile in planes.tiles(height, width):
        rows, columns = _blocks(tile.rows, height), _blocks(tile.columns, width)
        blocks = _reduce(planes.logs(tile).exp_(), height, width, largest)
        known = pooled[tile.planes, :, rows, columns]
        if largest:
            torch.maximum(known, blocks, out=known)
        else:
            known += blocks
    return Pooled(pooled.view(*given.query.shape[:2], *shape))


def attention_lse_backward(
    given: Queries, results: LogSumExp, grads: LogSumExp, _: Needed
) -> dict[str, Tensor]:
    """Gradients of query and key."""
    return _backward(given, results.lse, grads.lse, None)


def attention_entropy_backward(
    given: Rows, results: Entropy, grads: Entropy, _: Needed
) -> dict[str, Tensor]:
    """Gradients of query and key."""
    return _backward(given, given.lse, *upstream_of_entropy(grads.entropy, results))


def _backward(
    given: Queries | Rows, lse: Tensor, offset: Tensor, slope: Tensor | None
) -> dict[str, Tensor]:
    """Gradients of query and key for ``p_ij * (offset_i + slope_i * log p_ij)`` of the scores."""
    query, key = given.query, given.key
    planes = _Planes(given, lse)
    offset = offset.reshape(planes.queries.shape[:3])
    slope = None if slope is None else slope.reshape(planes.queries.shape[:3])
    grad_queries, grad_keys = torch.zeros_like(planes.queries), torch.zeros_like(planes.keys)
    for tile in planes.tiles():
        if slope is None:
            factor = offset[tile.queries][..., None]
            grad = planes.logs(tile).exp_().mul_(factor)
        else:
            weights, logs = planes.weights_and_logs(tile)
            factor = logs.mul_(slope[tile.queries][..., None]).add_(offset[tile.queries][..., None])
            grad = weights.mul_(factor)
        keys, queries = planes.keys[tile.keys], planes.queries[tile.queries]
        grad = grad.flatten(1, 2)
        grad_queries[tile.queries] += (grad @ keys).view(queries.shape)
        grad_keys[tile.keys] += grad.mT @ queries.flatten(1, 2)
    grad_query = grad_queries.mul_(scale_of(given)).view(query.shape).to(query.dtype)
    return {"query": grad_query, "key": grad_keys.view(key.shape).to(key.dtype)}


class _Tile(NamedTuple):
    """Some queries and keys of some planes."""

    planes: slice
    rows: slice
    columns: slice

    @property
    def queries(self) -> Index:
        """Where the queries lie in (planes, group, queries, …)."""
        return self.planes, slice(None), self.rows

    @property
    def keys(self) -> tuple[slice, slice]:
        """Where the keys lie in (planes, keys, …)."""
        return self.planes, self.columns

    @property
    def of_keys(self) -> Index:
        """Where what heads of queries have of keys lies in (planes, group, keys, …)."""
        return self.planes, slice(None), self.columns


class _Planes:
    """Scaled queries, keys, and the tiles of scores that they make."""

    def __init__(self, given: Queries | Rows | Columns | Blocks, lse: Tensor | None) -> None:
        query, key = given.query, given.key
        batch, kv_heads, keys, features = key.shape
        group, count = query.shape[1] // max(1, kv_heads), batch * kv_heads
        dtype = computation_dtype(query.dtype)
        shape = count, group, query.shape[2]
        self.queries = query.to(dtype).mul(scale_of(given)).reshape(*shape, features)
        self.keys = key.to(dtype).reshape(count, keys, features)
        # Rows whose log-sum-exp is -inf get weights of exp(-inf).
        shift = self.per_query(0.0) if lse is None else lse.reshape(shape)
        self._shift = shift.masked_fill(shift == -torch.inf, torch.inf)
        self._is_causal = given.is_causal

    def per_query(self, value: float) -> Tensor:
        """A number for each query."""
        return self.queries.new_full(self.queries.shape[:3], value)

    def tiles(self, height: int = 1, width: int = 1, first_query: int = 0) -> Iterator[_Tile]:
        """The tiles in which something is seen, each of whole blocks or within one."""
        count, group, queries, _ = self.queries.shape
        keys = self.keys.shape[1]
        size = max(1, group * min(QUERIES, queries) * min(KEYS, keys))
        for planes in _pieces(0, count, max(1, SCORES // size), 1):
            for rows in _pieces(first_query, queries, QUERIES, height):
                seen = min(keys, rows.stop) if self._is_causal else keys
                for columns in _pieces(0, keys, KEYS, width):
                    if columns.start >= seen:
                        break
                    yield _Tile(planes, rows, columns)

    def scores(self, tile: _Tile) -> Tensor:
        """Shape (planes, group, queries, keys), -inf where a key is not seen."""
        queries, keys = self.queries[tile.queries], self.keys[tile.keys]
        scores = (queries.flatten(1, 2) @ keys.mT).view(*queries.shape[:3], keys.shape[1])
        if self._is_causal and tile.columns.stop > tile.rows.start + 1:
            hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
            scores.masked_fill_(hidden.triu_(tile.rows.start - tile.columns.start + 1), -torch.inf)
        return scores

    def logs(self, tile: _Tile) -> Tensor:
        """The logarithm of the map."""
        return self.scores(tile).sub_(self._shift[tile.queries][..., None])

    def weights_and_logs(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        """The map and its logarithm, 0 where the map is 0."""
        logs = self.logs(tile)
        weights = logs.exp()
        return weights, logs.masked_fill_(weights == 0, 0)


def _finite(peak: Tensor) -> Tensor:
    """What scores are shifted by: the peak, unless that is not a number to subtract."""
    return peak.where(peak.isfinite(), 0)


def _pieces(start: int, stop: int, most: int, block: int) -> Iterator[slice]:
    """Slices of at most so many, each of whole blocks or, of larger ones, within one."""
    step = most // block * block
    while start < stop:
        end = start + step if step else min(start + most, (start // block + 1) * block)
        yield slice(start, min(end, stop))
        start = end


def _blocks(piece: slice, block: int) -> slice:
    """The blocks that a slice covers or lies in."""
    return slice(piece.start // block, (piece.stop - 1) // block + 1)


def _reduce(weights: Tensor, height: int, width: int, largest: bool) -> Tensor:
    """Reduce (planes, group, queries, keys) to blocks; what is missing of the last ones is 0."""
    planes, group, queries, keys = weights.shape
    height, width = min(height, queries), min(width, keys)
    blocks = F.pad(weights, (0, -keys % width, 0, -queries % height))
    blocks = blocks.view(planes, group, -(-queries // height), height, -(-keys // width), width)
    return blocks.amax((3, 5)) if largest else blocks.sum((3, 5))
