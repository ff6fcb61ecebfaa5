"""AdamP: Adam that does not lengthen scale-invariant weights."""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any

from torch import Tensor

from tilework.catalog import implements
from tilework.optim._optimizer import (
    PARAMETER,
    Numbers,
    Optimizer,
    average,
    average_,
    average_square_,
    bias_corrections,
    decay_rates,
    flag,
    move,
    non_negative,
    option,
    rate,
)
from tilework.optim.optimizers._projection import project

__all__ = ["AdamP"]


@implements(
    "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights",
    year=2020,
    arxiv="2006.08217",
)
class AdamP(Optimizer):
    r"""Adam whose steps are orthogonal to weights that a normalization follows.

    Momentum lengthens such weights, whose norm does not matter, and thereby shortens the effective
    step. With the parameter :math:`p`, its gradient :math:`g`, the moments :math:`m` = ``exp_avg``
    and :math:`v` = ``exp_avg_sq``, the number :math:`t` of the parameter's steps, :math:`\eta` =
    ``lr``, :math:`\lambda` = ``weight_decay``, :math:`\epsilon` = ``eps`` and ``betas`` =
    :math:`(\beta_1, \beta_2)`:

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2, \qquad
        u = \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} \\
        (u, f) &\leftarrow \begin{cases}
            (u - \langle \hat p, u \rangle \hat p,\ \texttt{wd\_ratio})
                & \cos(g, p) < \texttt{delta} / \sqrt n \\
            (u, 1) & \text{otherwise} \end{cases}, \qquad
        \hat p = \frac{p}{\lVert p \rVert + \epsilon} \\
        p &\leftarrow p - \eta \lambda f p - \frac{\eta}{1 - \beta_1^t}\, u

    The product :math:`\langle \hat p, u \rangle` and the absolute cosine are those of each channel,
    the elements at an index of the first dimension, :math:`n` in number; the largest cosine counts.
    If it is too large, they are those of the whole tensor. Tensors of at most one dimension are
    never projected. With ``nesterov`` :math:`\beta_1 m + (1 - \beta_1)\, g` takes the place of the
    new :math:`m` in :math:`u`.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter.
        lr: Learning rate, at least 0, or a tensor of one element.
        betas: What the moments keep of themselves, each from 0 to below 1.
        eps: Added to denominators, at least 0.
        weight_decay: Decoupled weight decay, at least 0.
        delta: How far from orthogonal to the weights the gradient may be, at least 0.
        wd_ratio: The factor of the decay of weights whose step is projected, at least 0.
        nesterov: Whether the step looks ahead.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import AdamP
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = AdamP([weight], lr=0.1)
        >>> weight.grad = torch.tensor([[-4.0, 3.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[3.1120, 3.9160]])

    Reference:
        Byeongho Heo, Sanghyuk Chun, Seong Joon Oh, and others. AdamP: Slowing Down the Slowdown for
        Momentum Optimizers on Scale-invariant Weights. 2020. arXiv:2006.08217.
    """

    lr: float | Tensor = option(1e-3, rate)
    betas: tuple[float, float] = option((0.9, 0.999), decay_rates)
    eps: float = option(1e-8, non_negative)
    weight_decay: float = option(0.0, non_negative)
    _: KW_ONLY
    delta: float = option(0.1, non_negative)
    wd_ratio: float = option(0.1, non_negative)
    nesterov: bool = option(False, flag)

    _elementwise = False

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"exp_avg": PARAMETER, "exp_avg_sq": PARAMETER}

    def _numbers(self, group: Numbers) -> dict[str, Any]:
        correction1, correction2 = bias_corrections(group)
        return {"step_size": group["lr"] / correction1, "root": correction2**0.5}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        beta1, beta2 = group["betas"]
        m = average_(state["exp_avg"], g, beta1)
        v = average_square_(state["exp_avg_sq"], g, beta2)
        if group["nesterov"]:
            m = average(m, g, beta1)
        u, factor = project(p, g, m / v.sqrt().div_(group["root"]).add_(group["eps"]), group)
        return move(p * (1 - group["lr"] * group["weight_decay"] * factor), u, group["step_size"])
