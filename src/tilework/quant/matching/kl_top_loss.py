"""The divergence from a teacher on the entries that it holds for the most probable."""

from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.quant._arguments import computed

__all__ = ["kl_top_loss"]


@implements(
    "OstQuant: Refining Large Language Model Quantization with Orthogonal and Scaling "
    "Transformations for Better Distribution Fitting",
    year=2025,
    arxiv="2501.13987",
)
def kl_top_loss(
    input: Tensor,
    target: Tensor,
    *,
    k: int = 1000,
    renormalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    r"""The divergence of a student from a teacher, on the teacher's most probable entries.

    With :math:`p` and :math:`q` the softmax of ``target`` and ``input`` over the whole vocabulary,
    and the set :math:`T` of the ``k`` largest logits of the teacher, those of lowest index where
    several are alike, for each row:

    .. math::

        \sum_{j \in T} p_j (\log p_j - \log q_j)

    With ``renormalize`` both are softmax over :math:`T` alone. Otherwise it may be negative where
    :math:`T` is not the whole vocabulary.

    Args:
        input: Logits of the student, of shape (..., V).
        target: Logits of the teacher, of the same shape; they have no gradient.
        k: Entries of a row, at least 1; no more than there are.
        renormalize: Whether probabilities are those among the entries.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over rows.

    Returns:
        A scalar, or one for each row, float64 if a tensor is and otherwise float32; the mean of no
        rows is nan.

    Raises:
        ValueError: The shapes differ or have no entries in a row, ``k`` is below 1, or
            ``reduction`` is not one of those above.
        TypeError: A tensor is not of a real floating dtype, or ``k`` not an int.

    Example:
        >>> import torch
        >>> from tilework.quant import kl_top_loss
        >>> teacher = torch.tensor([[2.0, 0.0, 0.0, -9.0]])
        >>> kl_top_loss(torch.zeros(1, 4), teacher, k=2)
        tensor(0.8116)

    Reference:
        Xing Hu, Yuan Cheng, Dawei Yang, and others. OstQuant: Refining Large Language Model
        Quantization with Orthogonal and Scaling Transformations for Better Distribution Fitting.
        2025. arXiv:2501.13987.
    """
    name = "kl_top_loss"
    for argument, tensor in (("input", input), ("target", target)):
        _checks.floating(name, argument, tensor)
    if not input.dim() or not input.shape[-1]:
        raise _checks.bad_value(name, "input", "of shape (..., V) with V of at least 1", input)
    _checks.shape(name, "target", target, input.shape)
    _checks.count(name, "k", k)
    _checks.one_of(name, "reduction", reduction, _checks.REDUCTIONS)
    dtype = computed(input, target)
    student, teacher = input.to(dtype), target.detach().to(dtype)
    whole = k >= input.shape[-1]
    if not whole:  # a stable sort, as the largest may be alike
        top = teacher.argsort(dim=-1, descending=True, stable=True)[..., :k]
    if renormalize and not whole:
        student, teacher = student.gather(-1, top), teacher.gather(-1, top)
    mine, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    if not renormalize and not whole:
        mine, theirs = mine.gather(-1, top), theirs.gather(-1, top)
    # What has no probability adds nothing, also where the student gives it none either.
    terms = theirs.exp() * (theirs - mine)
    losses = terms.where(theirs > -float("inf"), 0.0).sum(-1)
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
