"""Checks that the functions of the family share."""

from typing import Any

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.quant._groups import grid_shape

SCHEMES = ("asymmetric", "symmetric", "restricted", "minmax")
AXES = ("out", "in", "tensor")


def computed(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of computation: float64 if any floating tensor is, otherwise float32."""
    dtypes = {computation_dtype(tensor.dtype) for tensor in tensors if tensor is not None}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_weight(name: str, weight: Any, argument: str = "weight") -> None:
    """Refuse what is not a finite, non-empty matrix of a real floating dtype."""
    _checks.floating(name, argument, weight)
    if weight.dim() != 2 or not weight.numel():
        raise _checks.bad_value(name, argument, "a non-empty matrix", weight)
    check_finite(name, argument, weight)


def check_finite(name: str, argument: str, tensor: Tensor) -> None:
    """Refuse infinite and nan entries."""
    if _checks.has_values(tensor) and not tensor.isfinite().all():
        raise ValueError(f"{name}: {argument} must be finite everywhere")


def check_broadcastable(
    name: str, argument: str, tensor: Any, shape: torch.Size | tuple[int, ...]
) -> None:
    """Refuse what is not of a real floating dtype, or does not broadcast to a shape."""
    _checks.floating(name, argument, tensor)
    sizes = zip(reversed(tensor.shape), reversed(shape), strict=False)
    if tensor.dim() > len(shape) or any(size not in (1, whole) for size, whole in sizes):
        raise _checks.bad_value(name, argument, f"broadcastable to shape {tuple(shape)}", tensor)


def rows_of(name: str, input: Tensor, columns: int) -> Tensor:
    """The rows of a layer's inputs, of which there is one at least, of shape (n, in)."""
    _checks.floating(name, "input", input)
    if not input.dim() or input.shape[-1] != columns or not input.numel():
        raise _checks.bad_value(name, "input", f"non-empty of shape (..., {columns})", input)
    check_finite(name, "input", input)
    return input.detach().reshape(-1, columns)


def check_hessian(name: str, hessian: Any, columns: int) -> None:
    """Refuse what is not a finite symmetric matrix with a row for each input column."""
    _checks.floating(name, "hessian", hessian)
    _checks.shape(name, "hessian", hessian, (columns, columns))
    check_finite(name, "hessian", hessian)
    if _checks.has_values(hessian):
        largest = hessian.abs().amax()
        if (hessian - hessian.mT).abs().amax() > 1e-3 * largest:
            raise ValueError(f"{name}: hessian must be symmetric")


def check_bits(name: str, bits: Any, minimum: int = 1, argument: str = "bits") -> int:
    """The bits of a code, an int from a minimum to 8."""
    result = _checks.integer(name, argument, bits)
    if not minimum <= result <= 8:
        raise _checks.bad_value(name, argument, f"an int from {minimum} to 8", bits)
    return result


def check_granularity(name: str, group_size: Any, axis: Any = "out") -> None:
    """Refuse a group size or an axis that makes no groups."""
    _checks.one_of(name, "axis", axis, AXES)
    if group_size is not None:
        _checks.count(name, "group_size", group_size)
        if axis == "tensor":
            raise _checks.bad_value(name, "group_size", "None with axis='tensor'", group_size)


def check_grid_options(
    name: str, *, bits: Any, group_size: Any, scheme: Any, axis: Any = "out"
) -> None:
    """Refuse options that make no grid."""
    _checks.one_of(name, "scheme", scheme, SCHEMES)
    check_bits(name, bits, 2 if scheme in ("symmetric", "restricted") else 1)
    check_granularity(name, group_size, axis)


def check_grid(
    name: str,
    scale: Tensor,
    zero_point: Tensor,
    shape: tuple[int, ...],
    group_size: int | None,
    axis: str,
) -> None:
    """Refuse a scale and a zero-point that are not those of a matrix of a shape."""
    expected = grid_shape(shape, group_size, axis)
    for argument, tensor in (("scale", scale), ("zero_point", zero_point)):
        _checks.floating(name, argument, tensor)
        _checks.shape(name, argument, tensor, expected)


def check_codes(name: str, codes: object) -> None:
    """Refuse what is not a non-empty matrix of integers."""
    if not isinstance(codes, Tensor) or not is_integer(codes):
        raise _checks.bad_type(name, "codes", "an integer tensor", codes)
    if codes.dim() != 2 or not codes.numel():
        raise _checks.bad_value(name, "codes", "a non-empty matrix", codes)


def is_integer(tensor: Tensor) -> bool:
    """Whether a dtype has integers, bool apart."""
    dtype = tensor.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
