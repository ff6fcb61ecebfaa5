"""The loss that distills attention's own map of blocks into a gate."""

import math

from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements

__all__ = ["seer_gate_loss"]

_NAME = "seer_gate_loss"
REDUCTIONS = ("mean", "rowmean", "sum", "none")


@implements(
    "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    year=2024,
    arxiv="2410.13276",
)
def seer_gate_loss(
    input: Float[Tensor, "batch heads rows columns"],
    target: Float[Tensor, "batch heads rows columns"],
    *,
    skip_fraction: float = 0.25,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Divergence of the softmax of a gate's logits from the pooled map of its attention.

    With the logits :math:`z` = ``input``, :math:`t` = ``target``, the first :math:`\lfloor`
    ``skip_fraction`` :math:`\cdot\, n_q \rfloor` of :math:`n_q` block rows left out, and
    :math:`0 \log 0 = 0`:

    .. math::

        \ell_{bhij} = t_{bhij} \left(\log t_{bhij} - \log \mathrm{softmax}_j(z_{bhi})_j\right)

    Where :math:`t_{bhij} = 0`, the element is 0 with no gradient of its own, also for a logit of
    :math:`-\infty`. ``"mean"`` divides the sum by the number of remaining elements, as the authors'
    code does: it shrinks as sequences grow, and their recipe multiplies it by 10. ``"rowmean"``
    divides by the number of remaining rows of all heads: the mean Kullback-Leibler divergence,
    whatever the length. Computed in float32 (float64 for float64).

    Args:
        input: Logits of :class:`SeerGate`, shape ``(B, H, nq, nk)``.
        target: The true map, shape ``(B, H, nq, nk)``, each row adding up to 1 or all zeros; a
            constant: no gradient flows to it.
        skip_fraction: The part of the block rows, from the first on, that does not count; at least
            0 and below 1.
        reduction: ``"mean"``, ``"rowmean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` the elements of the remaining rows; float32 for half precision,
        otherwise of ``input``'s dtype. Means over nothing are nan.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: A tensor is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.attention import seer_gate_loss
        >>> logits = torch.zeros(1, 1, 2, 2, requires_grad=True)
        >>> target = torch.tensor([[1.0, 0.0], [0.5, 0.5]])[None, None]
        >>> seer_gate_loss(logits, target, skip_fraction=0.5, reduction="rowmean")
        tensor(0., grad_fn=<DivBackward0>)
        >>> seer_gate_loss(logits, target, skip_fraction=0.0, reduction="rowmean")
        tensor(0.3466, grad_fn=<DivBackward0>)

    Deviations:
        Hidden blocks may have logits of :math:`-\infty`, for which ``F.kl_div`` gives nan; the
        released gate has -1e9 there. ``"rowmean"``, ``"sum"`` and ``"none"`` are not in the
        released code.

    Reference:
        Yizhao Gao, Zhichen Zeng, Dayou Du, Shijie Cao, Peiyuan Zhou, Jiaxing Qi, Junjie Lai, Hayden
        Kwok-Hay So, Ting Cao, Fan Yang, Mao Yang. SeerAttention: Learning Intrinsic Sparse
        Attention in Your LLMs. 2024. arXiv:2410.13276.
    """
    _checks.floating(_NAME, "input", input)
    if input.dim() != 4:
        raise _checks.bad_value(_NAME, "input", "of shape (B, H, nq, nk)", input)
    _checks.floating(_NAME, "target", target)
    _checks.shape(_NAME, "target", target, input.shape)
    _checks.same_device(_NAME, input=input, target=target)
    if not 0 <= _checks.number(_NAME, "skip_fraction", skip_fraction) < 1:
        expected = "a number of at least 0 and below 1"
        raise _checks.bad_value(_NAME, "skip_fraction", expected, skip_fraction)
    _checks.one_of(_NAME, "reduction", reduction, REDUCTIONS)

    first = math.floor(skip_fraction * input.shape[2])
    dtype = computation_dtype(input.dtype)
    target = target.detach()[:, :, first:].to(dtype)
    logits = input[:, :, first:].to(dtype)
    # A row without a target counts for nothing, even where no logit is finite.
    logits = logits.masked_fill((target == 0).all(-1, keepdim=True), 0)
    log_probs = logits.log_softmax(-1).masked_fill(target == 0, 0)
    losses = target.xlogy(target) - target * log_probs
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (losses if reduction == "mean" else losses[..., 0]).numel()
