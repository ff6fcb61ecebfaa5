"""RMS normalization by the root mean square of the first features alone."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._implementations import TABLES
from tilework.catalog import implements
from tilework.norms import _row_norm
from tilework.norms._layer import NormLayer

__all__ = ["PartialRMSNorm", "partial_rms_norm"]

_NAME = "partial_rms_norm"
_TABLE = TABLES["norms.partial_rms_norm"] = tuple(
    entry for entry in _row_norm.IMPLEMENTATIONS if entry.name in ("triton", "reference")
)
_PAPER = implements("Root Mean Square Layer Normalization", year=2019, arxiv="1910.07467")


@_PAPER
def partial_rms_norm(
    input: Float[Tensor, "*batch features"],
    normalized_shape: int | Sequence[int],
    weight: Float[Tensor, " features"] | None = None,
    eps: float | None = None,
    *,
    fraction: float = 0.0625,
) -> Float[Tensor, "*batch features"]:
    r"""Divide by the root mean square that the first features have.

    With :math:`x` = ``input``, :math:`g` = ``weight``, :math:`d` = ``normalized_shape`` and
    :math:`k = \lceil d \cdot` ``fraction`` :math:`\rceil`, at least 1:

    .. math::

        y_i = \frac{x_i}{\sqrt{\frac{1}{k} \sum_{j \le k} x_j^2 + \epsilon}}\, g_i,
        \qquad i = 1, \dots, d

    Without ``weight``, :math:`g_i` is 1. Computed in float32 (float64 for float64 input) and
    rounded once at the end.

    Args:
        input: Any shape whose last dimension is ``normalized_shape``, any strides.
        normalized_shape: The size of the last dimension, an int or a sequence of one.
        weight: Gain, of shape ``(d,)`` and any floating dtype.
        eps: Added to the mean square, at least 0. None is the machine epsilon of the dtype of the
            computation.
        fraction: The part of the features that is measured, above 0 and at most 1.

    Returns:
        The normalized tensor, of ``input``'s shape and dtype.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: A tensor is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.norms import partial_rms_norm
        >>> partial_rms_norm(torch.tensor([[2.0, 4.0, 6.0]]), 3, eps=0.0, fraction=0.1)
        tensor([[1., 2., 3.]])

    Deviations:
        The authors' code adds epsilon to the root mean square and rounds :math:`k` down; here
        epsilon is under the root, as in :func:`rms_norm`, and :math:`k` rounded up, as in the
        paper.

    Reference:
        Biao Zhang, Rico Sennrich. Root Mean Square Layer Normalization. 2019. arXiv:1910.07467.
    """
    shape = _check_options(normalized_shape, eps, fraction)
    output = _row_norm.row_norm(
        _NAME,
        _TABLE,
        input,
        shape,
        weight,
        None,
        eps,
        # Rounding must not make one more of a whole number.
        num_measured=max(1, math.ceil(shape[0] * fraction - 1e-9)),
        weight_offset=0.0,
        centered=False,
    )
    assert isinstance(output, Tensor)
    return output


@_PAPER
class PartialRMSNorm(NormLayer):
    """:func:`partial_rms_norm` with its weight; the ``state_dict`` is that of ``RMSNorm``.

    Args:
        normalized_shape: The size of the last dimension, an int or a sequence of one.
        eps: Added to the mean square; None is the machine epsilon of the computation.
        elementwise_affine: Whether there is a parameter ``weight`` of shape ``normalized_shape``.
        fraction: The part of the features that is measured.
        device: Device of the weight.
        dtype: Its dtype.

    Raises:
        ValueError: A size or option is out of range.

    Example:
        >>> import torch
        >>> from tilework.norms import PartialRMSNorm
        >>> PartialRMSNorm(8, fraction=0.5)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])

    Reference:
        As :func:`partial_rms_norm`.
    """

    function = _NAME
    fraction: float = 0.0625

    def _check(self) -> None:
        _check_options(self.normalized_shape, self.eps, self.fraction)

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalized tensor."""
        return partial_rms_norm(
            input, self.normalized_shape, self.weight, self.eps, **self.options()
        )


def _check_options(
    normalized_shape: int | Sequence[int], eps: float | None, fraction: float
) -> tuple[int, ...]:
    shape = _checks.sizes(_NAME, "normalized_shape", normalized_shape)
    if len(shape) != 1:
        accepted = "an int or a sequence of one int"
        raise _checks.bad_value(_NAME, "normalized_shape", accepted, normalized_shape)
    if eps is not None:
        _checks.at_least(_NAME, "eps", eps, 0)
    _checks.positive_fraction(_NAME, "fraction", fraction)
    return shape
