"""The value that the logits of bins or points stand for."""

from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements
from tilework.losses._classes import class_index
from tilework.losses.classification import _value_bins

__all__ = ["categorical_value"]

_NAME = "categorical_value"
_KINDS = ("hl_gauss", "two_hot")


@implements(
    "Stop Regressing: Training Value Functions via Classification for Scalable Deep RL",
    year=2024,
    arxiv="2403.03950",
)
def categorical_value(
    input: Float[Tensor, "*batch bins"],
    *,
    min_value: float,
    max_value: float,
    kind: str = "hl_gauss",
) -> Float[Tensor, "*batch"]:
    r"""Mean of the values of bins or points under the softmax of logits.

    With the logits :math:`z` of a row of ``input``, :math:`m` in number:

    .. math::

        v = \sum_{k=0}^{m-1} \mathrm{softmax}(z)_k \, c_k

    where :math:`c` are the centers of :math:`m` bins that divide the interval from ``min_value`` to
    ``max_value`` (``"hl_gauss"``), or :math:`m` points equally spaced from one to the other
    (``"two_hot"``, also for C51).

    Args:
        input: Logits, shape ``(..., m)``, ``m >= 2``.
        min_value: Lower edge of the first bin, or first point.
        max_value: Upper edge of the last bin, or last point.
        kind: ``"hl_gauss"`` or ``"two_hot"``.

    Returns:
        Shape ``(...)``, of the dtype of ``input``, for half precision under autocast float32.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``input`` is not of a floating dtype, or an option is no number.

    Example:
        >>> import torch
        >>> from tilework.losses import categorical_value, two_hot_targets
        >>> probabilities = two_hot_targets(
        ...     torch.tensor(0.25), min_value=-1.0, max_value=2.0, num_bins=4
        ... )
        >>> categorical_value(probabilities.log(), min_value=-1.0, max_value=2.0, kind="two_hot")
        tensor(0.2500)

    Deviations:
        As :func:`hl_gauss_targets`.

    Reference:
        As :func:`hl_gauss_loss`.
    """
    _value_bins.check_input(_NAME, "input", input)
    _value_bins.check_range(_NAME, min_value, max_value)
    _checks.one_of(_NAME, "kind", kind, _KINDS)
    probabilities = input.to(computation_dtype(input.dtype)).softmax(-1)
    bins = input.shape[-1]
    margin = (max_value - min_value) / (2 * bins) if kind == "hl_gauss" else 0.0
    values = _value_bins.ends(probabilities, min_value + margin, max_value - margin, bins - 1)
    return (probabilities * values).sum(-1).to(class_index.result_dtype(input))
