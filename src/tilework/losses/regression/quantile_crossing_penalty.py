"""The penalty on quantiles that cross."""

from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements
from tilework.losses import _reduction
from tilework.losses._classes import class_index
from tilework.losses.regression import _quantiles

__all__ = ["quantile_crossing_penalty"]

_NAME = "quantile_crossing_penalty"


@implements("Flexible Model Aggregation for Quantile Regression", year=2021, arxiv="2103.00083")
def quantile_crossing_penalty(
    input: Float[Tensor, "*batch levels"],
    *,
    margin: float = 0.0,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""By how much neighboring quantiles stand in the wrong order.

    With the quantiles :math:`q_k` of ``input`` and the ``margin`` :math:`\delta`:

    .. math::

        \ell = \sum_{k=1}^{K-1} \max(q_k - q_{k+1} + \delta,\ 0)

    Args:
        input: Quantiles, shape ``(..., K)``, ``K >= 1``.
        margin: The distance that neighbors should keep, at least 0.
        reduction: ``"mean"`` over the leading dimensions, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` the shape of ``input`` without the last dimension; of the dtype
        of ``input``, for half precision under autocast float32. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``input`` is not of a floating dtype.

    Example:
        >>> import torch
        >>> from tilework.losses import quantile_crossing_penalty
        >>> quantile_crossing_penalty(torch.tensor([[1.0, 3.0, 2.5], [1.0, 2.0, 3.0]]))
        tensor(0.2500)

    Reference:
        Rasool Fakoor, Taesup Kim, Jonas Mueller, Alexander J. Smola, Ryan J. Tibshirani. Flexible
        Model Aggregation for Quantile Regression. 2021. arXiv:2103.00083.
    """
    _checks.at_least(_NAME, "margin", margin, 0)
    _checks.one_of(_NAME, "reduction", reduction, _checks.REDUCTIONS)
    _quantiles.check_quantiles(_NAME, input)
    rises = input.to(computation_dtype(input.dtype)).diff()
    penalties = (margin - rises).relu().sum(-1)
    return _reduction.reduce(penalties, reduction).to(class_index.result_dtype(input))
