"""What the scores of quantiles share: their checks."""

from typing import NamedTuple

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype


class Scored(NamedTuple):
    """Checked tensors in the dtype of the computation."""

    quantiles: Tensor
    target: Tensor
    """With a last dimension of one element."""
    levels: Tensor
    """nan where they are no levels and looking is not free."""


def check_quantiles(function: str, input: Tensor) -> None:
    """Refuse what has no last dimension of quantiles."""
    _checks.floating(function, "input", input)
    if input.dim() == 0 or input.shape[-1] == 0:
        raise _checks.bad_value(function, "input", "of shape (..., K), K >= 1", input)


def scored(function: str, input: Tensor, target: Tensor, quantile_levels: Tensor) -> Scored:
    """Check the tensors of a score."""
    check_quantiles(function, input)
    _checks.floating(function, "target", target)
    _checks.shape(function, "target", target, input.shape[:-1])
    _checks.constant(function, "quantile_levels", quantile_levels, input.shape[-1:])
    _checks.same_device(function, input=input, target=target, quantile_levels=quantile_levels)
    dtype = computation_dtype(torch.promote_types(input.dtype, target.dtype))
    levels = quantile_levels.to(dtype)
    regular = ((levels > 0) & (levels < 1)).all() & (levels.diff() > 0).all()
    if _checks.holds_values(quantile_levels) and not bool(regular):
        raise ValueError(
            f"{function}: quantile_levels must be above 0, below 1 and strictly increasing, "
            f"got {quantile_levels.tolist()}"
        )
    levels = levels.where(regular, torch.nan)
    return Scored(input.to(dtype), target.to(dtype).unsqueeze(-1), levels)


def pinball(scored: Scored) -> Tensor:
    """The pinball loss of each quantile, whose slope is 0 where it meets the target."""
    gap = scored.target - scored.quantiles
    slope = torch.where(gap < 0, scored.levels - 1, scored.levels).where(gap != 0, 0)
    return slope * gap
