"""Rows and columns of blocks, and what lists of them share."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tilework import _checks

Lengths = tuple[int, int] | None


class Lists(NamedTuple):
    """How many blocks each row has, and which, in order; after these may stand anything."""

    counts: Tensor
    indices: Tensor


class TopK(NamedTuple):
    """The arguments of a selection of the highest scores ``(B, H, nq, nk)``.

    Each row has ``places`` of shape ``(B, H, nq)``, at most ``most``, or ``most`` without; a list
    has room for ``width`` blocks. The first ``num_sinks`` are kept, and with ``force_diagonal``
    the diagonal ones.
    """

    scores: Tensor
    places: Tensor | None
    most: int
    width: int
    query_block: int
    key_block: int
    queries: int
    num_sinks: int
    is_causal: bool
    force_diagonal: bool


class Positions(NamedTuple):
    """The arguments of the positions of the first ``width`` True of each row of a mask."""

    mask: Tensor
    width: int


class Dense(NamedTuple):
    """The arguments of the mask of lists, or of its transpose."""

    counts: Tensor
    indices: Tensor
    columns: int
    is_transposed: bool


class Mask(NamedTuple):
    """A mask of blocks."""

    mask: Tensor


@dataclass(frozen=True)
class Grid:
    """The rows and columns of a layout, and what they stand for."""

    rows: int
    columns: int
    block_size: tuple[int, int]
    seq_lengths: Lengths

    @property
    def lengths(self) -> tuple[int, int]:
        """The lengths, or those of whole blocks."""
        whole = self.rows * self.block_size[0], self.columns * self.block_size[1]
        return self.seq_lengths or whole

    @property
    def most_diagonal(self) -> int:
        """A bound of the diagonal blocks of a row, exact for whole blocks in many rows."""
        bq, bk = self.block_size
        return (bk - math.gcd(bq, bk) + bq - 1) // bk + 1

    def diagonal(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        """The first and the last diagonal block of each row, not cut to the columns."""
        bq, bk = self.block_size
        first = torch.arange(self.rows, device=device) * bq
        last = (first + bq).clamp_max(self.lengths[0]) - 1
        return first // bk, last // bk


def forced_and_live(
    grid: Grid, device: torch.device, num_sinks: int, is_causal: bool, force_diagonal: bool
) -> tuple[Tensor, Tensor]:
    """Which blocks are kept whatever their score, and which may be, both ``(nq, nk)``."""
    first, last = (edge[:, None] for edge in grid.diagonal(device))
    column = torch.arange(grid.columns, device=device)
    forced = (column < min(num_sinks, grid.columns)).expand(grid.rows, grid.columns)
    if force_diagonal:
        forced = forced | (column >= first) & (column <= last)
    live = column <= last if is_causal else torch.ones_like(forced)
    return forced & live, live


def ceil_div(length: int, block: int) -> int:
    """The number of blocks that hold a length."""
    return -(-length // block)


def longest(counts: Tensor, bound: int) -> int:
    """The largest count, for which the host waits; its bound where values cannot be read."""
    if not _checks.has_values(counts):
        return bound
    return int(counts.max()) if counts.numel() else 0


def first(counts: Tensor, width: int) -> Tensor:
    """Which of ``width`` entries lie within the count of their row."""
    return torch.arange(width, device=counts.device) < counts[..., None]


def or_sentinel(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """The lists with the number of columns where nothing may be read."""
    return indices.where(first(counts, indices.shape[-1]), columns)


def count_up_to(bound: Tensor, counts: Tensor, indices: Tensor) -> Tensor:
    """How many entries of each row, which is in order, are at most ``bound``."""
    kept = first(counts, indices.shape[-1]) & (indices <= bound)
    return kept.sum(-1, dtype=torch.int32)
