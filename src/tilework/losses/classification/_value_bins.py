"""Bins and points on an interval of values, for regression by classification."""

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype


def check_range(function: str, min_value: float, max_value: float) -> None:
    """Refuse what is no interval."""
    for name, value in (("min_value", min_value), ("max_value", max_value)):
        if not abs(_checks.number(function, name, value)) < float("inf"):
            raise _checks.bad_value(function, name, "a finite number", value)
    if max_value <= min_value:
        raise _checks.bad_value(function, "max_value", f"above min_value={min_value}", max_value)


def check_num_bins(function: str, num_bins: int) -> None:
    """Refuse fewer than two."""
    _checks.integer(function, "num_bins", num_bins)
    if num_bins < 2:
        raise _checks.bad_value(function, "num_bins", "at least 2", num_bins)


def check_input(function: str, argument: str, input: Tensor) -> None:
    """Refuse what has not two bins at least in its last dimension."""
    _checks.floating(function, argument, input)
    if input.dim() == 0 or input.shape[-1] < 2:
        accepted = "of shape (..., num_bins), num_bins >= 2"
        raise _checks.bad_value(function, argument, accepted, input)


def places(target: Tensor, min_value: float, max_value: float, intervals: int) -> Tensor:
    """Where targets lie, from 0 at ``min_value`` to ``intervals`` at ``max_value`` and no further.

    Without a gradient, in float32 or better.
    """
    target = target.detach().to(computation_dtype(target.dtype))
    return ((target - min_value) * (intervals / (max_value - min_value))).clamp(0, intervals)


def grid(count: int, like: Tensor) -> Tensor:
    """The numbers 0, 1, ... in the dtype and on the device of a tensor."""
    return torch.arange(count, dtype=like.dtype, device=like.device)
