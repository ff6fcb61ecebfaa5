"""The focal loss of several labels."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework._options import OptionsModule
from tilework.catalog import implements
from tilework.losses import _reduction
from tilework.losses._classes import class_index

__all__ = ["MultilabelFocalLoss", "multilabel_focal_loss"]

_NAME = "multilabel_focal_loss"
_PAPER = implements(
    "Multi-Label Sentiment Analysis on 100 Languages with Dynamic Weighting for Label Imbalance",
    year=2020,
    arxiv="2008.11573",
)


@_PAPER
def multilabel_focal_loss(
    input: Float[Tensor, "*shape"],
    target: Float[Tensor, "*shape"],
    *,
    alpha: float = 1.0,
    gamma: float = 2.0,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Binary cross-entropy of each label, less for labels that are predicted well.

    With the binary cross-entropy :math:`b` between a ``target`` and the sigmoid of a logit in
    ``input``, :math:`\alpha` = ``alpha`` and :math:`\gamma` = ``gamma``:

    .. math::

        \ell = \alpha \, (1 - e^{-b})^{\gamma} \, b

    For a target of 0 or 1, :math:`e^{-b}` is the probability of the true label. The gradient flows
    through both factors; ``gamma=0`` is the binary cross-entropy times ``alpha``.

    Args:
        input: Logits, such as ``(N, C)``.
        target: Probabilities of the labels, from 0 to 1, the shape of ``input``.
        alpha: A factor for both labels, at least 0.
        gamma: The exponent, at least 0.
        reduction: ``"mean"`` over all elements, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` the shape of ``input``; of the dtype of ``input``, for half
        precision under autocast float32. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape or option is not one of those above; on the CPU, a target is not from 0
            to 1. Elsewhere its loss is nan.
        TypeError: A tensor is not of a floating dtype.

    Example:
        >>> import torch
        >>> from tilework.losses import multilabel_focal_loss
        >>> input, target = torch.tensor([[2.0, 2.0]]), torch.tensor([[1.0, 0.0]])
        >>> multilabel_focal_loss(input, target, reduction="none")
        tensor([[0.0018, 1.6501]])

    Reference:
        Selim F. Yilmaz, E. Batuhan Kaynak, Aykut Koç, Hamdi Dibeklioğlu, Suleyman S. Kozat.
        Multi-Label Sentiment Analysis on 100 Languages with Dynamic Weighting for Label Imbalance.
        2020. arXiv:2008.11573.
    """
    _check_options(alpha, gamma, reduction)
    _checks.floating(_NAME, "input", input)
    _checks.floating(_NAME, "target", target)
    _checks.shape(_NAME, "target", target, input.shape)
    _checks.same_device(_NAME, input=input, target=target)
    target = _checks.fractions(_NAME, "target", target)

    def focal(input: Tensor, target: Tensor) -> Tensor:
        dtype = computation_dtype(input.dtype)
        input, target = input.to(dtype), target.to(dtype)
        entropy = F.binary_cross_entropy_with_logits(input, target, reduction="none")
        # Powers have no derivative at 0, where the loss and its gradient are 0 by other factors.
        missed = _missed(input, target, entropy)
        missed = missed.where(missed != 0, 1)
        return alpha * missed**gamma * entropy

    loss = _reduction.reduce_rows(focal, (input, target), (), reduction)
    return loss.to(class_index.result_dtype(input))


def _missed(input: Tensor, target: Tensor, entropy: Tensor) -> Tensor:
    """``1 - exp(-entropy)``, without cancellation."""
    if not torch.compiler.is_compiling():
        return -(-entropy).expm1()
    # One pass over all need not wait for the logarithm in the entropy. The maximum has the right
    # slope at 0.
    smaller = input.abs().neg().exp()
    exponent = input * target - torch.maximum(input, input.new_zeros(()))
    return (smaller - exponent.expm1()) / (1 + smaller)


@_PAPER
class MultilabelFocalLoss(OptionsModule):
    """:func:`multilabel_focal_loss` as a module.

    Example:
        >>> import torch
        >>> from tilework.losses import MultilabelFocalLoss
        >>> MultilabelFocalLoss(gamma=0.0)(torch.zeros(2, 3), torch.ones(2, 3))
        tensor(0.6931)
    """

    alpha: float = 1.0
    gamma: float = 2.0
    reduction: str = "mean"

    def _check(self) -> None:
        _check_options(**self.options())

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss; shapes as in :func:`multilabel_focal_loss`."""
        return multilabel_focal_loss(input, target, **self.options())


def _check_options(alpha: float, gamma: float, reduction: str) -> None:
    _checks.at_least(_NAME, "alpha", alpha, 0)
    _checks.at_least(_NAME, "gamma", gamma, 0)
    _checks.one_of(_NAME, "reduction", reduction, _checks.REDUCTIONS)
