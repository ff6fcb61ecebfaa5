"""SGDP: SGD with momentum that does not lengthen scale-invariant weights."""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any

from torch import Tensor

from tilework.catalog import implements
from tilework.optim._optimizer import (
    PARAMETER,
    Numbers,
    Optimizer,
    decay_rate,
    flag,
    fraction,
    move,
    non_negative,
    option,
    rate,
)
from tilework.optim.optimizers._projection import project

__all__ = ["SGDP"]


@implements(
    "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
    year=2020,
    arxiv="2006.08217",
)
class SGDP(Optimizer):
    r"""SGD with momentum whose steps are orthogonal to weights that a normalization follows.

    With the parameter :math:`p`, its gradient :math:`g`, the buffer :math:`b` =
    ``momentum_buffer``, :math:`\mu` = ``momentum``, :math:`\tau` = ``dampening``, :math:`\eta` =
    ``lr``, :math:`\lambda` = ``weight_decay`` and :math:`\epsilon` = ``eps``:

    .. math::

        b &\leftarrow \mu b + (1 - \tau)\, g, \qquad
        u = \begin{cases} g + \mu b & \text{with } \texttt{nesterov} \\ b & \text{otherwise}
        \end{cases} \\
        (u, f) &\leftarrow \begin{cases}
            (u - \langle \hat p, u \rangle \hat p,\ \texttt{wd\_ratio})
                & \cos(g, p) < \texttt{delta} / \sqrt n \\
            (u, 1) & \text{otherwise} \end{cases}, \qquad
        \hat p = \frac{p}{\lVert p \rVert + \epsilon} \\
        p &\leftarrow p - \frac{\eta \lambda f}{1 - \mu}\, p - \eta u

    The product :math:`\langle \hat p, u \rangle` and the absolute cosine are those of each channel,
    the elements at an index of the first dimension, :math:`n` in number; the largest cosine counts.
    If it is too large, they are those of the whole tensor. Tensors of at most one dimension are
    never projected. Dampening acts from the first step.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter.
        lr: Learning rate, at least 0, or a tensor of one element.
        momentum: What the buffer keeps of itself, from 0 to below 1.
        dampening: What the buffer leaves of the gradient, from 0 to 1.
        weight_decay: Decoupled weight decay, at least 0.
        nesterov: Whether the step looks ahead.
        eps: Added to denominators, at least 0.
        delta: How far from orthogonal to the weights the gradient may be, at least 0.
        wd_ratio: The factor of the decay of weights whose step is projected, at least 0.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import SGDP
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = SGDP([weight], lr=0.1)
        >>> weight.grad = torch.tensor([[-4.0, 3.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[3.4000, 3.7000]])

    Deviations:
        Without ``nesterov`` the released code projects in place what is its buffer too. Here the
        buffer keeps the momentum as it is, as in the paper.

    Reference:
        Byeongho Heo, Sanghyuk Chun, Seong Joon Oh, and others. AdamP: Slowing Down the Slowdown for
        Momentum Optimizers on Scale-invariant Weights. 2020. arXiv:2006.08217.
    """

    lr: float | Tensor = option(1e-3, rate)
    momentum: float = option(0.0, decay_rate)
    dampening: float = option(0.0, fraction)
    weight_decay: float = option(0.0, non_negative)
    nesterov: bool = option(False, flag)
    _: KW_ONLY
    eps: float = option(1e-8, non_negative)
    delta: float = option(0.1, non_negative)
    wd_ratio: float = option(0.1, non_negative)

    _elementwise = False

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"momentum_buffer": PARAMETER}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        lr, momentum = group["lr"], group["momentum"]
        b = state["momentum_buffer"].mul_(momentum).add_(g * (1 - group["dampening"]))
        u, factor = project(p, g, g + momentum * b if group["nesterov"] else b, group)
        return move(p * (1 - lr * group["weight_decay"] * factor / (1 - momentum)), u, lr)
