"""What the scores of quantiles share: their checks."""

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype


def check_quantiles(function: str, input: Tensor) -> None:
    """Refuse what has no last dimension of quantiles."""
    _checks.floating(function, "input", input)
    if input.dim() == 0 or input.shape[-1] == 0:
        raise _checks.bad_value(function, "input", "of shape (..., K), K >= 1", input)


def checked_levels(function: str, input: Tensor, target: Tensor, quantile_levels: Tensor) -> Tensor:
    """Check the tensors of a score; the levels in the dtype of the computation.

    They are nan where they are no levels and looking is not free.
    """
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
    return levels.where(regular, torch.nan)


def pinball(input: Tensor, target: Tensor, levels: Tensor) -> Tensor:
    """The pinball loss of each quantile, whose slope is 0 where it meets the target."""
    gap = target.to(levels.dtype).unsqueeze(-1) - input.to(levels.dtype)
    # No masks, which compilers keep for the gradient: the sign has both slopes, and 0 between.
    side = gap.detach().sign()
    slope = torch.maximum(levels * side, (levels - 1) * side) * side
    return slope * gap


def interval_scores(input: Tensor, target: Tensor, levels: Tensor) -> Tensor:
    """Twice the mean pinball loss of each row's quantiles."""
    return 2 * pinball(input, target, levels).mean(-1)
