"""The weighted interval score of quantiles."""

from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.losses import _reduction
from tilework.losses._classes import class_index
from tilework.losses.regression import _quantiles

__all__ = ["weighted_interval_score"]

_NAME = "weighted_interval_score"


@implements("Flexible Model Aggregation for Quantile Regression", year=2021, arxiv="2103.00083")
def weighted_interval_score(
    input: Float[Tensor, "*batch levels"],
    target: Float[Tensor, "*batch"],
    quantile_levels: Float[Tensor, " levels"],
    *,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Twice the mean pinball loss of the quantiles of each target.

    With the quantiles :math:`q_k` of ``input``, their ``quantile_levels`` :math:`\tau_k` and the
    ``target`` :math:`y`:

    .. math::

        \ell = \frac{2}{K} \sum_{k=1}^{K}
            \max\big( \tau_k (y - q_k),\ (\tau_k - 1) (y - q_k) \big)

    For levels that are symmetric about one half and hold it, this is the weighted interval score of
    forecasts: the widths of the central intervals and the distances by which they miss.

    Args:
        input: Quantiles, shape ``(..., K)``, ``K >= 1``.
        target: What they should be quantiles of, shape ``(...)``, of any floating dtype.
        quantile_levels: Shape ``(K)``, strictly increasing, above 0 and below 1; a constant.
        reduction: ``"mean"`` over the targets, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target``; of the dtype of ``input``, for half
        precision under autocast float32. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape or option is not one of those above, or ``quantile_levels`` requires a
            gradient; on the CPU, the levels are none. Elsewhere the score is nan.
        TypeError: A tensor is not of a floating dtype.

    Example:
        >>> import torch
        >>> from tilework.losses import weighted_interval_score
        >>> quantiles, levels = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([0.1, 0.5, 0.9])
        >>> weighted_interval_score(quantiles, torch.tensor([3.0]), levels)
        tensor(0.5333)

    Reference:
        Rasool Fakoor, Taesup Kim, Jonas Mueller, Alexander J. Smola, Ryan J. Tibshirani. Flexible
        Model Aggregation for Quantile Regression. 2021. arXiv:2103.00083.
    """
    _checks.one_of(_NAME, "reduction", reduction, _checks.REDUCTIONS)
    levels = _quantiles.checked_levels(_NAME, input, target, quantile_levels)
    loss = _reduction.reduce_rows(_quantiles.interval_scores, (input, target), (levels,), reduction)
    return loss.to(class_index.result_dtype(input))
