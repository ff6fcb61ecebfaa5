"""Attention over all keys from attentions over parts of them."""

from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements

__all__ = ["merge_attention"]

_NAME = "merge_attention"


@implements(
    "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    year=2024,
    arxiv="2410.13276",
)
def merge_attention(
    outputs: Sequence[Float[Tensor, "*rows values"]], lses: Sequence[Float[Tensor, "*rows"]]
) -> tuple[Float[Tensor, "*rows values"], Float[Tensor, "*rows"]]:
    r"""Merge attentions of the same queries over disjoint sets of keys.

    With the output :math:`o^m_i` and the log-sum-exp :math:`\mathrm{lse}^m_i` of query :math:`i`
    over the keys of part :math:`m`:

    .. math::

        \mathrm{lse}_i = \log \sum_m e^{\mathrm{lse}^m_i}, \qquad
        o_i = \sum_m e^{\mathrm{lse}^m_i - \mathrm{lse}_i}\, o^m_i

    Where every part has :math:`-\infty`, the output is zero. Everything is computed in float32
    (float64 if a tensor is float64), and the output rounded once.

    Args:
        outputs: The outputs of one or more parts, each of shape ``(..., L, Ev)``.
        lses: Their log-sum-exps, as many, each of shape ``(..., L)``.

    Returns:
        The output over all keys, of the dtype of ``outputs[0]``, and its log-sum-exp, float32
        (float64 if a tensor is float64).

    Raises:
        ValueError: There are no parts, not as many ``lses`` as ``outputs``, or shapes differ.
        TypeError: A tensor is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.attention import merge_attention
        >>> outputs = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
        >>> lses = [torch.tensor([0.0]), torch.tensor([3.0]).log()]
        >>> output, lse = merge_attention(outputs, lses)
        >>> output, lse.exp()
        (tensor([[0.2500, 0.7500]]), tensor([4.]))

    Reference:
        As :func:`block_sparse_attention`.
    """
    _check(outputs, lses)
    dtype = computation_dtype(
        reduce(torch.promote_types, (tensor.dtype for tensor in (*outputs, *lses)))
    )
    stacked = torch.stack([lse.to(dtype) for lse in lses])
    blind = (stacked == -torch.inf).all(0)
    # What sees nothing is computed as if it saw all parts alike, so that nothing divides by 0.
    stacked = stacked.masked_fill(blind, 0)
    peak = stacked.amax(0).detach()
    masses = (stacked - peak).exp()
    total = masses.sum(0)
    weights = (masses / total).masked_fill(blind, 0)[..., None]
    output = sum(
        (weight * output.to(dtype) for weight, output in zip(weights, outputs, strict=True)),
        start=torch.zeros((), dtype=dtype, device=weights.device),
    )
    return output.to(outputs[0].dtype), (peak + total.log()).masked_fill(blind, -torch.inf)


def _check(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if not len(outputs) or len(outputs) != len(lses):
        raise ValueError(
            f"{_NAME}: outputs and lses must be of one length, at least 1, "
            f"got {len(outputs)} and {len(lses)}"
        )
    first = outputs[0]
    for place, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        for name, tensor in ((f"outputs[{place}]", output), (f"lses[{place}]", lse)):
            _checks.floating(_NAME, name, tensor)
            _checks.same_device(_NAME, **{"outputs[0]": first, name: tensor})
        if first.dim() < 2:
            raise _checks.bad_value(_NAME, "outputs[0]", "of shape (..., L, Ev)", first)
        _checks.shape(_NAME, f"outputs[{place}]", output, first.shape)
        _checks.shape(_NAME, f"lses[{place}]", lse, first.shape[:-1])
