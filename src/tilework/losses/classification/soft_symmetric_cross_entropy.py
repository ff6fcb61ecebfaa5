"""The cross-entropies between two predictions, in both directions."""

from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._options import OptionsModule
from tilework.catalog import implements
from tilework.losses._classes import class_index

__all__ = ["SoftSymmetricCrossEntropyLoss", "soft_symmetric_cross_entropy"]

_NAME = "soft_symmetric_cross_entropy"
_PAPER = implements(
    "Robust Mean Teacher for Continual and Gradual Test-Time Adaptation",
    year=2022,
    arxiv="2211.13081",
)


@_PAPER
def soft_symmetric_cross_entropy(
    input: Float[Tensor, "*logits"],
    teacher_input: Float[Tensor, "*logits"],
    *,
    alpha: float = 0.5,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Cross-entropy of a student under its teacher, and of the teacher under the student.

    With :math:`p_i` and :math:`q_i` the softmax of ``input`` and of ``teacher_input`` at a position
    and :math:`\alpha` = ``alpha``:

    .. math::

        \ell_i = -(1 - \alpha) \sum_j q_{ij} \log p_{ij} - \alpha \sum_j p_{ij} \log q_{ij}

    At :math:`\alpha = 0` it is ``F.cross_entropy(input, q)``. The second part is large where the
    student is sure of what the teacher rules out.

    Args:
        input: The student's logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        teacher_input: The teacher's, of the same shape; they get no gradient.
        alpha: The weight of the second part, from 0 to 1.
        reduction: ``"mean"`` over positions, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` one number for each position; of the dtype of ``input``, for
        half precision under autocast float32. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``input`` or ``teacher_input`` is not of a floating dtype.

    Example:
        >>> import torch
        >>> from tilework.losses import soft_symmetric_cross_entropy
        >>> soft_symmetric_cross_entropy(torch.zeros(4, 10), torch.randn(4, 10), alpha=0.0)
        tensor(2.3026)

    Deviations:
        The paper, for which :math:`\alpha = 1/2`, adds two such losses, of two views of an image.

    Reference:
        Mario Döbler, Robert A. Marsden, Bin Yang. Robust Mean Teacher for Continual and Gradual
        Test-Time Adaptation. 2022. arXiv:2211.13081.
    """
    _check_options(alpha, reduction)
    positions = class_index.positions(_NAME, input, None, -100)
    _checks.floating(_NAME, "teacher_input", teacher_input)
    _checks.shape(_NAME, "teacher_input", teacher_input, input.shape)
    _checks.same_device(_NAME, input=input, teacher_input=teacher_input)
    dim = positions.dim
    student = positions.logits.log_softmax(dim)
    teacher = teacher_input.detach().to(student.dtype).log_softmax(dim)
    products = (1 - alpha) * teacher.exp() * student + alpha * student.exp() * teacher
    return positions.reduce(-products.sum(dim), reduction)


@_PAPER
class SoftSymmetricCrossEntropyLoss(OptionsModule):
    """:func:`soft_symmetric_cross_entropy` as a module.

    Example:
        >>> import torch
        >>> from tilework.losses import SoftSymmetricCrossEntropyLoss
        >>> criterion = SoftSymmetricCrossEntropyLoss()
        >>> criterion(torch.zeros(4, 10), torch.zeros(4, 10))  # the entropy, log(10)
        tensor(2.3026)
    """

    alpha: float = 0.5
    reduction: str = "mean"

    def _check(self) -> None:
        _check_options(**self.options())

    def forward(self, input: Tensor, teacher_input: Tensor) -> Tensor:
        """Return the loss; shapes as in :func:`soft_symmetric_cross_entropy`."""
        return soft_symmetric_cross_entropy(input, teacher_input, **self.options())


def _check_options(alpha: float, reduction: str) -> None:
    _checks.fraction(_NAME, "alpha", alpha)
    _checks.one_of(_NAME, "reduction", reduction, _checks.REDUCTIONS)
