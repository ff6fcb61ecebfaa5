"""LARS: momentum SGD whose rate for each tensor follows the norms of weights and gradient."""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any

from torch import Tensor

from tilework.catalog import implements
from tilework.optim._optimizer import (
    PARAMETER,
    Numbers,
    Optimizer,
    check_nesterov,
    decay_rate,
    flag,
    length,
    move,
    non_negative,
    option,
    positive,
    rate,
)

__all__ = ["LARS"]


@implements("A Large Batch Optimizer Reality Check", year=2021, arxiv="2102.06356")
class LARS(Optimizer):
    r"""SGD with momentum, and a trust ratio for each tensor, for large batches.

    With the parameter :math:`p`, its gradient :math:`g`, the buffer :math:`b` =
    ``momentum_buffer``, :math:`\mu` = ``momentum``, :math:`\kappa` = ``trust_coefficient``,
    :math:`\eta` = ``lr``, :math:`\lambda` = ``weight_decay``, :math:`\epsilon` = ``eps`` and norms
    of whole tensors:

    .. math::

        r &= \frac{\kappa \lVert p \rVert}{\lVert g \rVert + \lambda \lVert p \rVert + \epsilon},
        \qquad q = \eta\, r\, (g + \lambda p) \\
        b &\leftarrow \mu b + q, \qquad
        p \leftarrow p - \begin{cases} q + \mu b & \text{with } \texttt{nesterov} \\
        b & \text{otherwise} \end{cases}

    Where :math:`\lVert p \rVert` or :math:`\lVert g \rVert + \lambda \lVert p \rVert` is 0,
    :math:`r = 1`. With ``exclude_1d``, tensors of at most one dimension, such as biases and gains,
    have :math:`r = 1` and no decay.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter.
        lr: Learning rate, at least 0, or a tensor of one element. The buffer holds it, so that a
            change acts on new gradients alone.
        momentum: What the buffer keeps of itself, from 0 to below 1.
        weight_decay: Weight decay, at least 0, inside of the ratio.
        trust_coefficient: The relative change of a tensor in a step of ``lr=1``, above 0.
        eps: Added to the denominator, at least 0.
        nesterov: Whether the step looks ahead; needs a momentum.
        exclude_1d: Whether tensors of at most one dimension follow plain momentum SGD.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import LARS
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = LARS([weight], lr=1.0, trust_coefficient=0.1)
        >>> (7 * weight[0, 1]).backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([[3.0000, 3.5000]])

    Reference:
        Zachary Nado, Justin M. Gilmer, Christopher J. Shallue, Rohan Anil, and George E. Dahl. A
        Large Batch Optimizer Reality Check: Traditional, Generic Optimizers Suffice Across Batch
        Sizes. 2021. arXiv:2102.06356.
    """

    lr: float | Tensor = option(1.0, rate)
    momentum: float = option(0.9, decay_rate)
    weight_decay: float = option(0.0, non_negative)
    _: KW_ONLY
    trust_coefficient: float = option(1e-3, positive)
    eps: float = option(1e-8, non_negative)
    nesterov: bool = option(False, flag)
    exclude_1d: bool = option(True, flag)

    _elementwise = False

    def _check(self, group: Mapping[str, Any]) -> None:
        check_nesterov(type(self).__name__, group)

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"momentum_buffer": PARAMETER}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        ratio, direction = 1.0, g
        if p.dim() > 1 or not group["exclude_1d"]:
            size = length(p)
            change = length(g) + group["weight_decay"] * size
            ratio = group["trust_coefficient"] * size / (change + group["eps"])
            ratio = ratio.where((size > 0) & (change > 0), 1.0)
            direction = move(g, p, -group["weight_decay"])
        q = direction * (group["lr"] * ratio)
        b = state["momentum_buffer"].mul_(group["momentum"]).add_(q)
        return p - (q + group["momentum"] * b if group["nesterov"] else b)
