"""Rows and columns of blocks, and the checks of arguments that describe them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilework import _checks

_UNBOUNDED = torch.iinfo(torch.int32).max

BlockSize = int | tuple[int, int]
Lengths = tuple[int, int] | None


@dataclass(frozen=True)
class Grid:
    """The rows and columns of a layout, and what they stand for."""

    rows: int
    columns: int
    block_size: tuple[int, int]
    seq_lengths: Lengths

    @classmethod
    def checked(
        cls, function: str, rows: int, columns: int, block_size: object, seq_lengths: object
    ) -> "Grid":
        """The grid of a layout, with its block size and lengths checked."""
        size = block_pair(function, block_size)
        if seq_lengths is None:
            return cls(rows, columns, size, None)
        lengths = pair(function, "seq_lengths", seq_lengths, 0)
        if tuple(map(ceil_div, lengths, size)) != (rows, columns):
            accepted = f"lengths that give {(rows, columns)} blocks of {size}"
            raise _checks.bad_value(function, "seq_lengths", accepted, lengths)
        return cls(rows, columns, size, lengths)

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


def check_scores(
    function: str,
    scores: Tensor,
    block_size: BlockSize,
    seq_lengths: Lengths,
    num_sink_blocks: int,
) -> tuple[Grid, Tensor]:
    """The grid, and scores that can be compared; with the checks that both selections share."""
    _checks.floating(function, "scores", scores)
    grid = grid_of(function, "scores", scores, block_size, seq_lengths)
    _checks.count(function, "num_sink_blocks", num_sink_blocks, 0)
    scores = scores.detach()
    return grid, scores.float() if scores.dtype.itemsize == 1 else scores


def forced_and_live(
    grid: Grid,
    device: torch.device,
    *,
    is_causal: bool,
    force_diagonal: bool,
    num_sink_blocks: int,
) -> tuple[Tensor, Tensor]:
    """Which blocks are kept whatever their score, and which may be, both ``(nq, nk)``."""
    first, last = (edge[:, None] for edge in grid.diagonal(device))
    column = torch.arange(grid.columns, device=device)
    forced = (column < min(num_sink_blocks, grid.columns)).expand(grid.rows, grid.columns)
    if force_diagonal:
        forced = forced | (column >= first) & (column <= last)
    live = column <= last if is_causal else torch.ones_like(forced)
    return forced & live, live


def ceil_div(length: int, block: int) -> int:
    """The number of blocks that hold a length."""
    return -(-length // block)


def pair(function: str, argument: str, value: object, least: int) -> tuple[int, int]:
    """Two ints, each at least ``least``; refuse anything else."""
    pair = tuple(value) if isinstance(value, Sequence) else (value,)
    for number in pair:
        _checks.integer(function, argument, number)
    if len(pair) != 2 or min(pair) < least:
        accepted = f"a pair of ints, each at least {least}"
        raise _checks.bad_value(function, argument, accepted, value)
    return pair


def block_pair(function: str, value: object) -> tuple[int, int]:
    """A block size as a pair; refuse sizes below 1."""
    return pair(function, "block_size", value if isinstance(value, Sequence) else (value,) * 2, 1)


def grid_of(
    function: str, argument: str, tensor: Tensor, block_size: BlockSize, seq_lengths: Lengths
) -> Grid:
    """The grid of a tensor of shape ``(B, H, nq, nk)``."""
    if tensor.dim() != 4:
        raise _checks.bad_value(function, argument, "of shape (B, H, nq, nk)", tensor)
    rows, columns = tensor.shape[2:]
    return Grid.checked(function, rows, columns, block_size, seq_lengths)


def per_head(function: str, **options: int | Sequence[int | None] | None) -> list[list[int]]:
    """Each option as a list with a number for each head."""
    counts = {len(value) for value in options.values() if isinstance(value, Sequence)}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(
            f"{function}: sequences must have the same number of heads, at least 1, in "
            f"{', '.join(options)}, got {sorted(counts)}"
        )
    heads = counts.pop() if counts else 1
    lists: list[list[Any]] = []
    for name, value in options.items():
        unbounded = None if name == "num_sink_blocks" else _UNBOUNDED
        lists.append([])
        for number in value if isinstance(value, Sequence) else [value] * heads:
            number = unbounded if number is None else number
            _checks.count(function, name, number, 0)
            lists[-1].append(number)
    return lists


def check_integers(function: str, argument: str, value: object) -> None:
    """Refuse what is not a tensor of an integer dtype."""
    if (
        not isinstance(value, Tensor)
        or value.dtype == torch.bool
        or value.is_floating_point()
        or value.is_complex()
    ):
        raise _checks.bad_type(function, argument, "an integer tensor", value)


def check_broadcasts(function: str, argument: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Refuse a tensor that does not broadcast to a shape."""
    sizes = zip(tensor.shape[::-1], shape[::-1], strict=False)
    if tensor.dim() > len(shape) or any(size not in (1, full) for size, full in sizes):
        raise _checks.bad_value(function, argument, f"broadcastable to {tuple(shape)}", tensor)


def check_places(function: str, k: Tensor, scores: Tensor) -> Tensor:
    """A number of places for each row, int64; refuse negative ones on the CPU."""
    check_integers(function, "k", k)
    check_broadcasts(function, "k", k, scores.shape[:3])
    _checks.same_device(function, scores=scores, k=k)
    k = k.long()  # torch compares no wide unsigned integers
    if _checks.holds_values(k) and (k < 0).any():
        raise ValueError(f"{function}: k must be at least 0, got {int(k.min())}")
    return k
