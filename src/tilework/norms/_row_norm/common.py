"""What implementations of RMS and layer normalization take and give."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from tilework._operators import computation_dtype


class RowNorm(NamedTuple):
    """The arguments of a normalization of rows.

    Attributes:
        input: What is normalized over its last ``dims`` dimensions.
        residual: What is added to it first. ``input_dtype`` and ``residual_dtype`` are the dtypes.
        weight: The gain, less ``weight_offset``. With one dimension more than ``dims``, it has a
            row for each entry of the dimension before.
        bias: What is added last.
        num_measured: The elements whose squares the scale is of, the first ones; all of them if
            ``dims`` is above 1.
        centered: Whether the mean is subtracted first.
    """

    input: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dims: int
    num_measured: int
    eps: float
    weight_offset: float
    centered: bool
    input_dtype: torch.dtype
    residual_dtype: torch.dtype | None
    implementation: str

    @property
    def total_dtype(self) -> torch.dtype:
        """That of the sum: the wider one, but for float64 beside what is computed in float32."""
        return _total_dtype(self.input_dtype, self.residual_dtype or self.input_dtype)


@functools.cache
def _total_dtype(input: torch.dtype, residual: torch.dtype) -> torch.dtype:
    compute, wider = computation_dtype(input), torch.promote_types(input, residual)
    return wider if torch.promote_types(wider, compute) == compute else compute


class Normalized(NamedTuple):
    """The rows, the sum that they were made of, and what its statistics were.

    The sum is empty without a residual, and the mean if none was subtracted.
    """

    output: Tensor
    total: Tensor
    mean: Tensor
    rstd: Tensor


class Backward(NamedTuple):
    """The arguments of a first derivative: gradients of output and sum, and what was saved.

    The gradient of ``total`` is of ``dtype``, those of weight and bias of their own; ``needed`` is
    which of them are.
    """

    grad_output: Tensor
    grad_total: Tensor | None
    total: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    dims: int
    num_measured: int
    eps: float
    weight_offset: float
    centered: bool
    dtype: torch.dtype
    needed: list[bool]
    implementation: str


class Gradients(NamedTuple):
    """The gradients of the sum, the weight and the bias, empty where not needed."""

    total: Tensor
    weight: Tensor
    bias: Tensor
