"""Quantiles in order, by sorting or by isotonic regression."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements
from tilework.losses.regression import _quantiles

__all__ = ["monotone_quantiles"]

_NAME = "monotone_quantiles"
METHODS = ("sort", "isotonic")


@implements("Flexible Model Aggregation for Quantile Regression", year=2021, arxiv="2103.00083")
def monotone_quantiles(
    input: Float[Tensor, "*batch levels"],
    *,
    method: str = "sort",
) -> Float[Tensor, "*batch levels"]:
    r"""Make quantiles that cross non-decreasing; the pinball loss does not rise by it.

    With the quantiles :math:`q` of ``input``, the result is their ascending order (``"sort"``) or
    the nearest non-decreasing vector (``"isotonic"``):

    .. math::

        \operatorname*{argmin}_{v_1 \le \dots \le v_K} \sum_{k=1}^{K} (v_k - q_k)^2

    Isotonic regression replaces blocks of quantiles by their means. Gradients pass through the
    permutation, or are replaced by their means over the same blocks. A nan stays where it is
    (``"isotonic"``) or comes last (``"sort"``).

    Args:
        input: Quantiles, shape ``(..., K)``, ``K >= 1``.
        method: ``"sort"`` or ``"isotonic"``, for which ``torch.export`` fixes ``K``.

    Returns:
        The shape and dtype of ``input``.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``input`` is not of a floating dtype.

    Example:
        >>> import torch
        >>> from tilework.losses import monotone_quantiles
        >>> monotone_quantiles(torch.tensor([1.0, 4.0, 2.0]))
        tensor([1., 2., 4.])
        >>> monotone_quantiles(torch.tensor([1.0, 4.0, 2.0]), method="isotonic")
        tensor([1., 3., 3.])

    Reference:
        Rasool Fakoor, Taesup Kim, Jonas Mueller, Alexander J. Smola, Ryan J. Tibshirani. Flexible
        Model Aggregation for Quantile Regression. 2021. arXiv:2103.00083.
    """
    _checks.one_of(_NAME, "method", method, METHODS)
    _quantiles.check_quantiles(_NAME, input)
    if method == "sort":
        return input.sort(-1).values
    values = input.to(computation_dtype(input.dtype))
    return _block_means(values, _blocks(values.detach())).to(input.dtype)


def _blocks(values: Tensor) -> Int64[Tensor, "*batch levels"]:
    """The number of each element's block: pool neighbors of which the first has a larger mean.

    A round pools at least two blocks, or is the last that matters.
    """
    block = torch.arange(values.shape[-1], device=values.device).expand(values.shape)
    for _ in range(values.shape[-1] - 1):
        means = _block_means(values, block)
        starts = (block.diff() > 0) & ~(means.diff() < 0)
        if _checks.holds_values(values) and torch.equal(starts, block.diff() > 0):
            break
        block = torch.nn.functional.pad(starts.cumsum(-1), (1, 0))
    return block


def _block_means(values: Tensor, block: Int64[Tensor, "*batch levels"]) -> Tensor:
    """The mean of each element's block."""
    zeros = torch.zeros_like(values)
    sums = zeros.scatter_add(-1, block, values)
    counts = zeros.scatter_add(-1, block, torch.ones_like(values)).clamp(min=1)
    return (sums / counts).gather(-1, block)
