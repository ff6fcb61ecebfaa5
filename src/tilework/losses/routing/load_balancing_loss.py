"""The load-balancing loss of mixtures of experts, over a local or a global batch."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework._options import StatefulModule, state
from tilework.catalog import implements

__all__ = ["GlobalLoadBalancer", "expert_counts", "load_balancing_loss"]

_NAME = "load_balancing_loss"
_PAPER = implements(
    "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized "
    "Mixture-of-Expert Models",
    year=2025,
    arxiv="2501.11873",
)


@_PAPER
def load_balancing_loss(
    router_probs: Float[Tensor, "*tokens experts"],
    expert_index: Int64[Tensor, "*tokens chosen"],
    *,
    mask: Bool[Tensor, "*tokens"] | None = None,
    normalize: bool = True,
    counts: Int64[Tensor, " experts"] | None = None,
    group: Any = None,
) -> Float[Tensor, ""]:
    r"""Products of how often each expert is chosen and how probable the router finds it.

    With the kept tokens :math:`K`, :math:`T` in number, their probabilities :math:`p_t` =
    ``router_probs``, :math:`E` experts, and :math:`n_e` the times that expert :math:`e` occurs in
    ``expert_index``:

    .. math::

        f_e = \frac{n_e}{\sum_j n_j}, \qquad P_e = \frac{1}{T} \sum_{t \in K} p_{te}, \qquad
        \ell = E \sum_e f_e P_e

    The loss is 1 for a balanced router and at most :math:`E`. :math:`f` has no gradient.

    Without ``group`` and ``counts``, :math:`n` is that of this call: the **local-batch** loss. It
    balances every micro-batch, which keeps experts from specializing. The **global-batch** loss
    takes :math:`n` from all processes of a ``group``, or from ``counts`` accumulated over
    micro-batches, as :class:`GlobalLoadBalancer` does; :math:`P` stays that of this call. The mean
    of it over processes or micro-batches of equally many tokens is the loss of their union.

    Args:
        router_probs: Each token's softmax over all experts, shape ``(..., E)``.
        expert_index: The experts that each token is sent to, int64 of shape ``(..., k)``.
        mask: Which tokens count, bool of shape ``(...)``; None for all. The others' probabilities
            and experts are not read.
        normalize: Whether :math:`f` sums to 1; False multiplies the loss by ``k``, as in Switch
            and Mixtral.
        counts: What takes the place of :math:`n`, int64 of shape ``(E)``.
        group: The process group over which :math:`n` is summed, also under ``torch.compile``; None
            does not communicate. ``vmap`` over ``expert_index`` has no rule for it.

    Returns:
        A scalar of the dtype of ``router_probs``, for half precision float32; nan if no token is
        kept or :math:`n` is 0. To be multiplied by a coefficient, commonly 1e-3 to 1e-2.

    Raises:
        ValueError: A shape is not one of those above, or both ``counts`` and ``group`` are given.
        TypeError: An argument is of another type or dtype.
        IndexError: On the CPU, an expert of a kept token lies outside ``[0, E)``. Elsewhere torch's
            own check stops the program.

    Example:
        >>> import torch
        >>> from tilework.losses import load_balancing_loss
        >>> router_probs = torch.tensor([[0.75, 0.25, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]])
        >>> load_balancing_loss(router_probs, torch.tensor([[0], [0]]))  # 4 * 0.625
        tensor(2.5000)
        >>> load_balancing_loss(router_probs, torch.tensor([[0, 1], [0, 2]]))
        tensor(1.6250)

    Deviations:
        ``transformers`` joins the layers of a model before averaging; here a call is one layer.

    Reference:
        Zihan Qiu, Zeyu Huang, Bo Zheng, and others. Demons in the Detail: On Implementing Load
        Balancing Loss for Training Specialized Mixture-of-Expert Models. 2025. arXiv:2501.11873.
    """
    _checks.floating(_NAME, "router_probs", router_probs)
    if router_probs.dim() == 0 or router_probs.shape[-1] == 0:
        accepted = "of shape (..., E), E >= 1"
        raise _checks.bad_value(_NAME, "router_probs", accepted, router_probs)
    *tokens, experts = router_probs.shape
    _check_tokens(_NAME, expert_index, mask, tokens)
    if not isinstance(normalize, bool):
        raise _checks.bad_type(_NAME, "normalize", "a bool", normalize)
    _check_group(_NAME, group)
    _checks.same_device(
        _NAME, router_probs=router_probs, expert_index=expert_index, mask=mask, counts=counts
    )
    if counts is None:
        counts = _summed(_count(_NAME, expert_index, experts, mask), group)
    else:
        _check_counts(counts, experts, group)

    dtype = computation_dtype(router_probs.dtype)
    if mask is not None:
        router_probs = router_probs.where(mask.unsqueeze(-1), 0)
    rows = router_probs.reshape(-1, experts)
    mean = rows.sum(0, dtype=dtype) / (rows.shape[0] if mask is None else mask.sum())
    loss = experts * (counts.to(dtype) / counts.sum() * mean).sum()
    return loss if normalize else loss * expert_index.shape[-1]


@_PAPER
def expert_counts(
    expert_index: Int64[Tensor, "*tokens chosen"],
    num_experts: int,
    *,
    mask: Bool[Tensor, "*tokens"] | None = None,
) -> Int64[Tensor, " experts"]:
    r"""How many times each expert is chosen by the kept tokens.

    With the kept tokens :math:`K`:

    .. math::

        n_e = \#\{(t, j) : t \in K,\ \mathrm{expert\_index}_{tj} = e\}

    Args:
        expert_index: The experts that each token is sent to, int64 of shape ``(..., k)``.
        num_experts: Their number ``E``.
        mask: Which tokens count, bool of shape ``(...)``; None for all.

    Returns:
        int64 of shape ``(E)``.

    Raises:
        ValueError: A shape is not one of those above, or ``num_experts`` is below 1.
        TypeError: An argument is of another type or dtype.
        IndexError: On the CPU, an expert of a kept token lies outside ``[0, E)``. Elsewhere torch's
            own check stops the program.

    Example:
        >>> import torch
        >>> from tilework.losses import expert_counts
        >>> expert_counts(torch.tensor([[0, 1], [3, 0]]), 4)
        tensor([2, 1, 0, 1])

    Reference:
        As :func:`load_balancing_loss`.
    """
    name = "expert_counts"
    _checks.count(name, "num_experts", num_experts)
    _check_tokens(name, expert_index, mask, None)
    _checks.same_device(name, expert_index=expert_index, mask=mask)
    return _count(name, expert_index, num_experts, mask)


@_PAPER
class GlobalLoadBalancer(StatefulModule):
    r"""The global-batch :func:`load_balancing_loss`, over micro-batches and processes.

    In training, each call adds its counts :math:`n`, summed over ``group``, to the buffer
    ``counts``, and its loss takes :math:`f` from the buffer and :math:`P` from the call: the first
    micro-batches of a step see the counts so far, the last one those of all. In evaluation the loss
    takes ``counts`` :math:`+ n` and leaves the buffer alone.

    Call :meth:`reset` after each step of the optimizer; loading a ``state_dict`` resets too. A
    forward pass that is computed again for its gradient (activation checkpointing) counts again:
    keep the loss outside of it.

    Args:
        num_experts: Number of experts ``E``.
        normalize: Whether :math:`f` sums to 1, or to the experts of a token.
        group: The process group over which counts are summed; None does not communicate.

    Raises:
        ValueError: ``num_experts`` is below 1.
        TypeError: An argument is of another type.

    Example:
        >>> import torch
        >>> from tilework.losses import GlobalLoadBalancer
        >>> balancer = GlobalLoadBalancer(4)
        >>> router_probs = torch.tensor([[0.75, 0.25, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]])
        >>> balancer(router_probs, torch.tensor([[0], [0]]))
        tensor(2.5000)
        >>> balancer(router_probs, torch.tensor([[1], [2]])), balancer.counts
        (tensor(1.6250), tensor([2, 1, 1, 0]))
        >>> balancer.reset()

    Reference:
        As :func:`load_balancing_loss`.
    """

    num_experts: int = field(kw_only=False)
    normalize: bool = True
    group: Any = None
    counts: Tensor = state(
        lambda self: torch.zeros(self.num_experts, dtype=torch.int64), persistent=False
    )

    def _check(self) -> None:
        name = type(self).__name__
        _checks.count(name, "num_experts", self.num_experts)
        if not isinstance(self.normalize, bool):
            raise _checks.bad_type(name, "normalize", "a bool", self.normalize)
        _check_group(name, self.group)

    def forward(
        self, router_probs: Tensor, expert_index: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Count, and return the loss; shapes as in :func:`load_balancing_loss`."""
        name = type(self).__name__
        _checks.floating(name, "router_probs", router_probs)
        if router_probs.shape[-1:] != (self.num_experts,):
            accepted = f"of shape (..., {self.num_experts})"
            raise _checks.bad_value(name, "router_probs", accepted, router_probs)
        _check_tokens(name, expert_index, mask, router_probs.shape[:-1])
        _checks.same_device(
            name,
            counts=self.counts,
            router_probs=router_probs,
            expert_index=expert_index,
            mask=mask,
        )
        counts = _summed(_count(name, expert_index, self.num_experts, mask), self.group)
        counts = self.counts + counts
        if self.training:
            self.counts.copy_(counts)
        return load_balancing_loss(
            router_probs, expert_index, mask=mask, normalize=self.normalize, counts=counts
        )

    def reset(self) -> None:
        """Forget all counts."""
        self.counts.zero_()


def _check_tokens(
    function: str, expert_index: Tensor, mask: Tensor | None, tokens: Sequence[int] | None
) -> None:
    """Refuse indices and a mask that are not of the same tokens."""
    if not isinstance(expert_index, Tensor) or expert_index.dtype != torch.int64:
        accepted = "int64 of shape (..., k)"
        raise _checks.bad_type(function, "expert_index", accepted, expert_index)
    shape = tuple(expert_index.shape[:-1])
    if expert_index.dim() == 0 or (tokens is not None and shape != tuple(tokens)):
        sizes = ["..."] if tokens is None else map(str, tokens)
        accepted = f"of shape ({', '.join([*sizes, 'k'])})"
        raise _checks.bad_value(function, "expert_index", accepted, expert_index)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise _checks.bad_type(function, "mask", f"bool of shape {shape}", mask)
        _checks.shape(function, "mask", mask, shape)


def _check_counts(counts: Tensor, experts: int, group: Any) -> None:
    if group is not None:
        raise ValueError(f"{_NAME}: counts and group must not both be given")
    if not isinstance(counts, Tensor) or counts.dtype != torch.int64:
        raise _checks.bad_type(_NAME, "counts", f"int64 of shape ({experts},)", counts)
    _checks.shape(_NAME, "counts", counts, (experts,))


def _check_group(function: str, group: Any) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise _checks.bad_type(function, "group", "a process group or None", group)


def _count(function: str, index: Tensor, experts: int, mask: Tensor | None) -> Tensor:
    kept = torch.ones_like(index)
    if mask is not None:
        kept = mask.unsqueeze(-1).expand_as(index)
        index = index.where(kept, 0)
    if _checks.holds_values(index):
        wrong = (index < 0) | (index >= experts)
        if bool(wrong.any()):
            raise IndexError(
                f"{function}: expert_index must lie in [0, {experts}), got {int(index[wrong][0])}"
            )
    counts = torch.zeros(experts, dtype=torch.int64, device=index.device)
    return counts.scatter_add(0, index.flatten(), kept.flatten().to(torch.int64))


def _summed(counts: Tensor, group: Any) -> Tensor:
    if group is not None:
        dist.all_reduce(counts, group=group)
    return counts
