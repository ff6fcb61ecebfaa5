"""What the implementations in plain PyTorch, and the launchers of kernels, have in common."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tilework._operators import HALF, computation_dtype

_BFLOAT16_PRODUCTS = torch.cpu._is_avx512_bf16_supported()


def slices(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that cover ``length``."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


# The statistics of rows, in the order of ``reference.linear_logit_stats``.
Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the matrix products: half precision only where the processor multiplies it."""
    if tensor.device.type != "cpu":
        return tensor.dtype
    if tensor.dtype == torch.bfloat16 and _BFLOAT16_PRODUCTS:
        return torch.bfloat16
    return computation_dtype(tensor.dtype)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to a total in the computation dtype."""
    if left.dtype not in HALF:
        total.addmm_(left, right)
    elif left.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        # The CPU rounds each product to half precision.
        total.add_(left @ right)


def kept_rows(
    input: Tensor, target: Tensor, ignore_index: int
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The rows that count: their indices (None for all of them), hidden states and targets."""
    ignored = target == ignore_index
    if input.device.type != "cpu":
        # Counting would synchronize, so ignored rows are computed on zeros.
        rows = torch.arange(len(input), device=input.device)
        return rows, input.masked_fill(ignored[:, None], 0), target
    if not ignored.any():
        return None, input, target
    rows = ignored.logical_not().nonzero()[:, 0]
    return rows, input.index_select(0, rows), target.index_select(0, rows)


def spread(values: Tensor, rows: Tensor | None, length: int, dim: int) -> Tensor:
    """Put values back to their rows along a dimension, zeros elsewhere."""
    if rows is None:
        return values
    shape = list(values.shape)
    shape[dim] = length
    return values.new_zeros(shape).index_copy_(dim, rows, values)
