"""The offset that gives intervals their coverage, from held-out points."""

import math
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements

__all__ = ["conformal_offset"]

_NAME = "conformal_offset"


@implements("Flexible Model Aggregation for Quantile Regression", year=2021, arxiv="2103.00083")
def conformal_offset(
    lower: Float[Tensor, " points"],
    upper: Float[Tensor, " points"],
    target: Float[Tensor, " points"],
    *,
    alpha: float,
) -> Float[Tensor, ""]:
    r"""By how much to widen intervals so that they miss a part ``alpha`` of new points at most.

    With ``lower`` :math:`l_i` and ``upper`` :math:`u_i` ends of the intervals of :math:`n` points
    that no model was fitted to, and their ``target`` :math:`y_i`:

    .. math::

        s_i = \max(l_i - y_i,\ y_i - u_i), \qquad
        \mathrm{offset} = s_{(j)}, \quad j = \lceil (n + 1) (1 - \alpha) \rceil

    the :math:`j`-th smallest, infinite for :math:`j > n`. The calibrated interval of a new point is
    ``[lower - offset, upper + offset]``; a negative offset narrows it. No gradient is recorded.

    Args:
        lower: Lower ends, shape ``(n)``, ``n >= 1``.
        upper: Upper ends, shape ``(n)``.
        target: The observed values, shape ``(n)``.
        alpha: The part, above 0 and below 1, that may be missed; the decimal number that it prints
            as, so that :math:`(n + 1) (1 - \alpha)` is exact.

    Returns:
        A scalar of the dtype of ``lower``.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: A tensor is not of a floating dtype, or ``alpha`` is no number.

    Example:
        >>> import torch
        >>> from tilework.losses import conformal_offset
        >>> lower, upper = torch.zeros(4), torch.ones(4)
        >>> conformal_offset(lower, upper, torch.tensor([0.5, 1.25, -0.5, 2.0]), alpha=0.4)
        tensor(0.5000)

    Reference:
        Rasool Fakoor, Taesup Kim, Jonas Mueller, Alexander J. Smola, Ryan J. Tibshirani. Flexible
        Model Aggregation for Quantile Regression. 2021. arXiv:2103.00083.
    """
    _checks.open_fraction(_NAME, "alpha", alpha)
    for argument, tensor in (("lower", lower), ("upper", upper), ("target", target)):
        _checks.floating(_NAME, argument, tensor)
    if lower.dim() != 1 or lower.shape[0] == 0:
        raise _checks.bad_value(_NAME, "lower", "of shape (n), n >= 1", lower)
    _checks.shape(_NAME, "upper", upper, lower.shape)
    _checks.shape(_NAME, "target", target, lower.shape)
    _checks.same_device(_NAME, lower=lower, upper=upper, target=target)
    dtype = lower.dtype
    lower, upper, target = (
        tensor.detach().to(computation_dtype(tensor.dtype)) for tensor in (lower, upper, target)
    )
    scores = torch.maximum(lower - target, target - upper)
    kept = 1 - Fraction(repr(float(alpha)))
    rank = -(-(scores.shape[0] + 1) * kept.numerator // kept.denominator)
    infinite = scores.new_full((1,), math.inf)
    offset = torch.cat([scores.sort().values, infinite])[min(rank, scores.shape[0] + 1) - 1]
    return offset.where(~scores.isnan().any(), math.nan).to(dtype)
