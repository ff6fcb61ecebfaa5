"""Bins and points on an interval of values, for regression by classification."""

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype


def check_range(function: str, min_value: float, max_value: float) -> None:
    """Refuse what is no interval."""
    for name, value in (("min_value", min_value), ("max_value", max_value)):
        _checks.finite(function, name, value)
    if max_value <= min_value:
        raise _checks.bad_value(function, "max_value", f"above min_value={min_value}", max_value)


def check_input(function: str, argument: str, input: Tensor) -> None:
    """Refuse what has not two bins at least in its last dimension."""
    _checks.floating(function, argument, input)
    if input.dim() == 0 or input.shape[-1] < 2:
        accepted = "of shape (..., num_bins), num_bins >= 2"
        raise _checks.bad_value(function, argument, accepted, input)


def gaps(target: Tensor, min_value: float, max_value: float, intervals: int) -> Tensor:
    """What lies between values and the ends of equal intervals, in a new last dimension.

    Values outside count as the nearer end. Without a gradient, in float32 or better.
    """
    target = target.detach().to(computation_dtype(target.dtype)).unsqueeze(-1)
    return ends(target, min_value, max_value, intervals) - target.clamp(min_value, max_value)


def ends(like: Tensor, min_value: float, max_value: float, intervals: int) -> Tensor:
    """The ends of equal intervals, in the dtype and on the device of a tensor."""
    # As torch.linspace, which takes no symbolic number: from the nearer end.
    place = torch.arange(intervals + 1, dtype=like.dtype, device=like.device)
    step = (max_value - min_value) / intervals
    low, high = like.new_full((), min_value), like.new_full((), max_value)
    return torch.where(
        2 * place <= intervals,
        low.add(place, alpha=step),
        high.add(intervals - place, alpha=-step),
    )
