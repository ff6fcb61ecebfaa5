"""The pinball loss of quantiles."""

from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.losses import _reduction
from tilework.losses._classes import class_index
from tilework.losses.regression import _quantiles

__all__ = ["pinball_loss"]

_NAME = "pinball_loss"


@implements("Flexible Model Aggregation for Quantile Regression", year=2021, arxiv="2103.00083")
def pinball_loss(
    input: Float[Tensor, "*batch levels"],
    target: Float[Tensor, "*batch"],
    quantile_levels: Float[Tensor, " levels"],
    *,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Pinball loss, which the quantiles of the target's distribution minimize.

    With a predicted quantile :math:`q_k` of ``input``, its level :math:`\tau_k` in
    ``quantile_levels`` and the ``target`` :math:`y`:

    .. math::

        \ell_k = \max\big( \tau_k (y - q_k),\ (\tau_k - 1) (y - q_k) \big)

    Where :math:`y = q_k` the gradient is 0.

    Args:
        input: Quantiles, shape ``(..., K)``, ``K >= 1``.
        target: What they should be quantiles of, shape ``(...)``, of any floating dtype.
        quantile_levels: Shape ``(K)``, strictly increasing, above 0 and below 1; a constant.
        reduction: ``"mean"`` over all quantiles, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` the shape of ``input``; of the dtype of ``input``, for half
        precision under autocast float32. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape or option is not one of those above, or ``quantile_levels`` requires a
            gradient; on the CPU, the levels are none. Elsewhere the loss is nan.
        TypeError: A tensor is not of a floating dtype.

    Example:
        >>> import torch
        >>> from tilework.losses import pinball_loss
        >>> quantiles, levels = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([0.1, 0.5, 0.9])
        >>> pinball_loss(quantiles, torch.tensor([3.0]), levels, reduction="none")
        tensor([[0.2000, 0.5000, 0.1000]])

    Reference:
        Rasool Fakoor, Taesup Kim, Jonas Mueller, Alexander J. Smola, Ryan J. Tibshirani. Flexible
        Model Aggregation for Quantile Regression. 2021. arXiv:2103.00083.
    """
    _checks.one_of(_NAME, "reduction", reduction, _checks.REDUCTIONS)
    levels = _quantiles.checked_levels(_NAME, input, target, quantile_levels)
    loss = _reduction.reduce_rows(_quantiles.pinball, (input, target), (levels,), reduction)
    return loss.to(class_index.result_dtype(input))
