"""Calls that lead to every kernel of the folder in every configuration."""

from functools import partial

import torch

from tilework.quant.products.packed_linear import triton
from tilework.quant.products.packed_linear.common import Backward, Product

OUTPUTS = 128  # few, so that there are parts


def _weights(columns: int, bits: int, group_size: int | None) -> tuple[torch.Tensor, ...]:
    groups = 1 if group_size is None else -(-columns // group_size)
    packed = torch.zeros(OUTPUTS, -(-columns * bits // 8), dtype=torch.uint8)
    return packed, torch.ones(OUTPUTS, groups), torch.ones(OUTPUTS, groups)


def forward(
    dtype: torch.dtype, rows: int, bits: int, group_size: int | None, columns: int = 1024
) -> None:
    """The product, of parts where the rows are few."""
    input = torch.ones(rows, columns, dtype=dtype)
    bias = torch.ones(OUTPUTS, dtype=dtype)
    weights = _weights(columns, bits, group_size)
    triton.forward(Product(input, *weights, bias, columns, bits, group_size, "triton"))


def backward(dtype: torch.dtype, bits: int, group_size: int | None, columns: int = 1024) -> None:
    """The gradient of the input."""
    grad = torch.ones(300, OUTPUTS, dtype=dtype)
    weights = _weights(columns, bits, group_size)
    triton.backward(Backward(grad, *weights, columns, bits, group_size, "triton"))


LAUNCHES = [
    *(
        partial(forward, dtype, rows, bits, group_size)
        for dtype in (torch.bfloat16, torch.float32)
        for rows in (1, 300)
        for bits, group_size in ((4, 32), (4, 128), (8, None), (2, 48))
    ),
    *(
        partial(backward, dtype, bits, group_size)
        for dtype in (torch.bfloat16, torch.float32)
        for bits, group_size in ((4, 32), (4, 128), (8, None))
    ),
    partial(forward, torch.float16, 1, 4, 32, columns=1001),
]
