"""Groups of consecutive columns or rows that share a grid, the last of which may be shorter."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Columns whose groups are of one size."""

    columns: slice
    groups: slice
    size: int


def runs(columns: int, group_size: int | None) -> Iterator[Run]:
    """The full groups of a row, then the shorter one."""
    size = columns if group_size is None else min(group_size, columns)
    full = columns // size
    yield Run(slice(0, full * size), slice(0, full), size)
    if columns % size:
        yield Run(slice(full * size, columns), slice(full, full + 1), columns % size)


def as_rows(tensor: Tensor, axis: str) -> Tensor:
    """A matrix with the columns along which groups run: itself, its transpose, or one row."""
    if axis == "tensor":
        return tensor.reshape(1, -1)
    return tensor.mT if axis == "in" else tensor


def grid_shape(
    shape: torch.Size | tuple[int, ...], group_size: int | None, axis: str
) -> tuple[int, int]:
    """The shape of the scales of a matrix."""
    if axis == "tensor":
        return 1, 1
    lines, columns = shape if axis == "out" else tuple(reversed(shape))
    groups = 1 if group_size is None else -(-columns // group_size)
    return (lines, groups) if axis == "out" else (groups, lines)


def spread(grid: Tensor, shape: tuple[int, ...], group_size: int | None, axis: str) -> Tensor:
    """A scale or zero-point for each entry of a matrix, without a copy where that can be."""
    if axis == "in":
        return spread(grid.mT, tuple(reversed(shape)), group_size, "out").mT
    if group_size is None:
        return grid.expand(shape)
    return grid.repeat_interleave(min(group_size, shape[-1]), 1)[:, : shape[-1]]
