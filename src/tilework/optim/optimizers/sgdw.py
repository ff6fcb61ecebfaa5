"""SGD with momentum and decoupled weight decay."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tilework.catalog import implements
from tilework.optim._optimizer import (
    PARAMETER,
    DecoupledDecay,
    Numbers,
    Optimizer,
    check_nesterov,
    decay_rate,
    flag,
    fraction,
    move,
    non_negative,
    option,
    rate,
    where,
)

__all__ = ["SGDW"]


@implements("Decoupled Weight Decay Regularization", year=2017, arxiv="1711.05101")
class SGDW(DecoupledDecay, Optimizer):
    r"""Stochastic gradient descent with momentum and decoupled weight decay.

    With the parameter :math:`p`, its gradient :math:`g`, the buffer :math:`b` =
    ``momentum_buffer``, :math:`\mu` = ``momentum``, :math:`\tau` = ``dampening``, :math:`\eta` =
    ``lr`` and :math:`\lambda` = ``weight_decay``:

    .. math::

        b \leftarrow \mu b + (1 - \tau)\, g, \qquad
        u = \begin{cases} g + \mu b & \text{with } \texttt{nesterov} \\ b & \text{otherwise}
        \end{cases}, \qquad
        p \leftarrow p - \eta \lambda\, p - \eta u

    In the first step :math:`b = g`, without dampening. Without momentum :math:`u = g`, and there is
    no buffer.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter; complex ones count
            as pairs of real ones.
        lr: Learning rate, at least 0, or a tensor of one element.
        momentum: What the buffer keeps of itself, from 0 to below 1.
        dampening: What the buffer leaves of the gradient, from 0 to 1.
        weight_decay: Decoupled weight decay, at least 0.
        nesterov: Whether the step looks ahead; needs a momentum, and no dampening.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import SGDW
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> optimizer = SGDW([weight], lr=0.1, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.8000, -1.6000,  2.4000])

    Deviations:
        The paper multiplies the gradient by the learning rate before it enters the momentum. Here
        the buffer holds gradients, as in :class:`torch.optim.SGD`: the same for a constant rate.
        The paper's decay is ``decouple_lr=True``.

    Reference:
        Ilya Loshchilov and Frank Hutter. Decoupled Weight Decay Regularization. 2017.
        arXiv:1711.05101.
    """

    lr: float | Tensor = option(1e-3, rate)
    momentum: float = option(0.0, decay_rate)
    dampening: float = option(0.0, fraction)
    weight_decay: float = option(0.0, non_negative)
    nesterov: bool = option(False, flag)

    _accepts_complex = True

    def _check(self, group: Mapping[str, Any]) -> None:
        check_nesterov(type(self).__name__, group)

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"momentum_buffer": PARAMETER} if group["momentum"] else {}

    def _numbers(self, group: Numbers) -> dict[str, Any]:
        return {"fresh": where(group["t"] == 1, 1.0, 1 - group["dampening"])}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        u = g
        if "momentum_buffer" in state:
            b = state["momentum_buffer"].mul_(group["momentum"]).add_(group["fresh"] * g)
            u = g + group["momentum"] * b if group["nesterov"] else b
        return move(p, u, group["lr"])
