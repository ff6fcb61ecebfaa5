"""The penalty on the squared log-partition function of the logits."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.losses import _class_index
from tilework.losses._criterion import Criterion

__all__ = ["ZLoss", "z_loss"]

_NAME = "z_loss"
_PAPER = implements(
    "Small-scale proxies for large-scale Transformer training instabilities",
    year=2023,
    arxiv="2309.14322",
)


@_PAPER
def z_loss(
    input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."] | None = None,
    *,
    coefficient: float = 1e-4,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Penalty on the squared log-sum-exp of the logits, which keeps it near 0.

    With the logits :math:`z_i` of a position of ``input`` and :math:`\zeta` = ``coefficient``:

    .. math::

        \ell_i = \zeta \Big( \log \sum_v \exp z_{iv} \Big)^2

    ``"mean"`` is the mean over the kept positions: of squares, not the square of a mean.

    Args:
        input: Logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: Classes, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``, which say only which
            positions are ignored; None keeps all.
        coefficient: What the squares are multiplied by, at least 0.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` one number for each position with zeros where ignored; of the
        dtype of ``input``, for half precision under autocast float32. ``"mean"`` over nothing is
        nan.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``input`` is not of a floating dtype, or ``target`` is not int64.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import z_loss
        >>> z_loss(torch.zeros(4, 10), coefficient=1.0)  # log(10)**2
        tensor(5.3019)

    Deviations:
        A part of a training loss in the paper, which does not say how ignored positions count: here
        not at all. :func:`cross_entropy_with_z_loss` and :func:`linear_cross_entropy` have the same
        term beside the likelihood.

    Reference:
        Mitchell Wortsman, Peter J. Liu, Lechao Xiao, and others. Small-scale proxies for
        large-scale Transformer training instabilities. 2023. arXiv:2309.14322.
    """
    _check_options(coefficient, ignore_index, reduction)
    positions = _class_index.positions(_NAME, input, target, ignore_index)
    log_sum = torch.logsumexp(positions.logits, positions.dim)
    return positions.reduce(coefficient * log_sum.square(), reduction)


@_PAPER
class ZLoss(Criterion):
    """:func:`z_loss` as a module.

    Args:
        coefficient: What the squares are multiplied by, at least 0.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: An option is not one of those above.

    Example:
        >>> import torch
        >>> from tilework.losses import ZLoss
        >>> ZLoss(coefficient=1.0)(torch.zeros(4, 10))
        tensor(5.3019)

    Reference:
        As :func:`z_loss`.
    """

    def __init__(
        self,
        *,
        coefficient: float = 1e-4,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check_options(coefficient, ignore_index, reduction)
        self.coefficient = coefficient
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss; shapes as in :func:`z_loss`."""
        return z_loss(
            input,
            target,
            coefficient=self.coefficient,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


def _check_options(coefficient: float, ignore_index: int, reduction: str) -> None:
    _checks.at_least(_NAME, "coefficient", coefficient, 0)
    _class_index.check_options(_NAME, ignore_index, reduction)
