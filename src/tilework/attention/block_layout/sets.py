"""Unions and intersections of lists of blocks."""

import torch
from torch import Tensor

from tilework.attention.block_layout import operators
from tilework.attention.block_layout.common import Lists, or_sentinel


def union(left: Lists, right: Lists, columns: int) -> Lists:
    """The blocks of either; sizes of 1 of batch and heads broadcast."""
    merged = _merged(left, right, columns)
    keep = merged < columns
    keep[..., 1:] &= merged.diff(dim=-1) > 0
    return _kept(merged, keep, min(merged.shape[-1], columns))


def intersection(left: Lists, right: Lists, columns: int) -> Lists:
    """The blocks of both; sizes of 1 of batch and heads broadcast."""
    merged = _merged(left, right, columns)
    keep = (merged[..., 1:] < columns) & (merged.diff(dim=-1) == 0)
    return _kept(merged[..., 1:], keep, min(left.indices.shape[-1], right.indices.shape[-1]))


def _merged(left: Lists, right: Lists, columns: int) -> Tensor:
    """The blocks of both in order, and then the number of columns."""
    sizes = zip(left.counts.shape[:2], right.counts.shape[:2], strict=True)
    batch, heads = (b if a == 1 else a for a, b in sizes)
    both = [or_sentinel(*lists, columns).expand(batch, heads, -1, -1) for lists in (left, right)]
    return torch.cat(both, -1).sort(dim=-1).values


def _kept(values: Tensor, keep: Tensor, width: int) -> Lists:
    """Of increasing columns with repetitions, those to keep; at most ``width`` in a row."""
    counts, places = operators.positions(keep, width)
    # What stands after the counts may be anything.
    places = places.clamp(0, max(values.shape[-1] - 1, 0)).long()
    return Lists(counts, values.gather(-1, places))
