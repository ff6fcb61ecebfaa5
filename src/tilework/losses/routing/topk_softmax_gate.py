"""A router's gate: the softmax over the largest logits of each token."""

from typing import Literal, NamedTuple, overload

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements

__all__ = ["TopKGate", "topk_softmax_gate"]

_NAME = "topk_softmax_gate"
_PAPER = implements(
    "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts",
    year=2023,
    arxiv="2309.13850",
)


@_PAPER
class TopKGate(NamedTuple):
    """What :func:`topk_softmax_gate` returns.

    Args:
        weights: The weight of each chosen expert, shape ``(..., k)``; a token's sum to 1.
        indices: The chosen experts, int64 of shape ``(..., k)``, the largest logit first.

    Example:
        >>> import torch
        >>> from tilework.losses import topk_softmax_gate
        >>> topk_softmax_gate(torch.tensor([0.0, 2.0, 2.0]), 2)
        TopKGate(weights=tensor([0.5000, 0.5000]), indices=tensor([1, 2]))

    Reference:
        As :func:`topk_softmax_gate`.
    """

    weights: Float[Tensor, "*tokens chosen"]
    indices: Int64[Tensor, "*tokens chosen"]


@overload
def topk_softmax_gate(input: Tensor, k: int, *, dense: Literal[False] = False) -> TopKGate: ...


@overload
def topk_softmax_gate(input: Tensor, k: int, *, dense: Literal[True]) -> Tensor: ...


@overload
def topk_softmax_gate(input: Tensor, k: int, *, dense: bool) -> TopKGate | Tensor: ...


@_PAPER
def topk_softmax_gate(
    input: Float[Tensor, "*tokens experts"], k: int, *, dense: bool = False
) -> TopKGate | Float[Tensor, "*tokens experts"]:
    r"""Choose the experts of the ``k`` largest logits, weighted by a softmax over these alone.

    With the logits :math:`z` of a token in ``input`` and :math:`S` the indices of the ``k`` largest
    ones, the smaller index first where they are equal:

    .. math::

        g_e = \frac{\exp z_e}{\sum_{j \in S} \exp z_j} \text{ for } e \in S, \qquad 0
        \text{ elsewhere}

    The gradient reaches the chosen logits alone; at ``k = 1`` the weight is 1 and it is 0.

    Args:
        input: A router's logits, shape ``(..., E)``.
        k: How many experts a token is sent to, from 1 to ``E``.
        dense: Whether to return :math:`g`, with its zeros.

    Returns:
        A :class:`TopKGate`; with ``dense`` :math:`g`, shape ``(..., E)``. Weights have the dtype of
        ``input``, and are computed in float32 at least.

    Raises:
        ValueError: ``input`` is not of shape ``(..., E)`` with E >= 1, or ``k`` is out of range.
        TypeError: ``input`` is not of a floating dtype, ``k`` not an int or ``dense`` not a bool.

    Example:
        >>> import torch
        >>> from tilework.losses import topk_softmax_gate
        >>> input = torch.tensor([[0.1, 0.4, 0.2, 0.2]]).log()
        >>> topk_softmax_gate(input, 2, dense=True)
        tensor([[0.0000, 0.6667, 0.3333, 0.0000]])

    Deviations:
        The paper leaves open which of equal logits is taken, as ``torch.topk`` does.

    Reference:
        Huy Nguyen, Pedram Akbarian, Fanqi Yan, Nhat Ho. Statistical Perspective of Top-K Sparse
        Softmax Gating Mixture of Experts. 2023. arXiv:2309.13850.
    """
    _checks.floating(_NAME, "input", input)
    if input.dim() == 0 or input.shape[-1] == 0:
        raise _checks.bad_value(_NAME, "input", "of shape (..., E), E >= 1", input)
    _checks.integer(_NAME, "k", k)
    if not 1 <= k <= input.shape[-1]:
        raise _checks.bad_value(_NAME, "k", f"from 1 to {input.shape[-1]}", k)
    if not isinstance(dense, bool):
        raise _checks.bad_type(_NAME, "dense", "a bool", dense)

    order = torch.sort(input.detach(), dim=-1, descending=True, stable=True).indices
    indices = order[..., :k]
    chosen = input.gather(-1, indices).to(computation_dtype(input.dtype))
    weights = chosen.softmax(-1).to(input.dtype)
    if dense:
        return torch.zeros_like(input).scatter(-1, indices, weights)
    return TopKGate(weights, indices)
