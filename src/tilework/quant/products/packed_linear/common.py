"""What implementations of the product take and give."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tilework.quant._arguments import computed
from tilework.quant._groups import spread
from tilework.quant.storage.pack_codes import unpack_codes

ELEMENTS = 2**20
"""Weights that exist at a time."""


class Product(NamedTuple):
    """The arguments of the product.

    Attributes:
        input: Of shape (rows, in), where ``columns`` is the second size.
        packed: Codes of shape (out, in) as a stream of bits along each row.
        scale: A number for each group of a row, as ``zero_point``.
    """

    input: Tensor
    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    columns: int
    bits: int
    group_size: int | None
    implementation: str


class Output(NamedTuple):
    """Of shape (rows, out), in the dtype of the input."""

    output: Tensor


class Backward(NamedTuple):
    """The arguments of the gradient of the input."""

    grad_output: Tensor
    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    columns: int
    bits: int
    group_size: int | None
    implementation: str


class Gradient(NamedTuple):
    """Of shape (rows, in), in the dtype of the gradient of the output."""

    input: Tensor


def empty_output(given: Product) -> Output:
    """A contiguous tensor."""
    return Output(given.input.new_empty(given.input.shape[0], given.packed.shape[0]))


def empty_gradient(given: Backward) -> Gradient:
    """A contiguous tensor."""
    return Gradient(given.grad_output.new_empty(given.grad_output.shape[0], given.columns))


def operations(rows: Tensor, columns: int) -> int:
    """Those of the product of rows with a matrix of so many columns."""
    return 2 * rows.shape[0] * rows.shape[1] * columns


def weights(given: Product | Backward, dtype: torch.dtype, outputs: slice = slice(None)) -> Tensor:
    """The weights of some outputs, rounded once to the dtype."""
    grids = given.scale[outputs], given.zero_point[outputs]
    wide = torch.promote_types(dtype, computed(*grids))
    codes = unpack_codes(given.packed[outputs], given.bits, given.columns).to(wide)
    scale, zero_point = (
        spread(grid.to(wide), tuple(codes.shape), given.group_size, "out") for grid in grids
    )
    return (scale * (codes - zero_point)).to(dtype)


def tiles(given: Product | Backward, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weights of some outputs after others."""
    height = max(1, ELEMENTS // max(1, given.columns))
    for first in range(0, given.packed.shape[0], height):
        outputs = slice(first, first + height)
        yield outputs, weights(given, dtype, outputs)
