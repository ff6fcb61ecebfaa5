"""ALRSMAG: a Polyak step size for momentum that sums up gradients."""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any

from torch import Tensor

from tilework.catalog import implements
from tilework.optim._optimizer import PARAMETER, Numbers, option, positive
from tilework.optim.optimizers._polyak import PolyakOptimizer

__all__ = ["ALRSMAG"]


@implements(
    "Generalized Polyak Step Size for First Order Optimization with Momentum",
    year=2023,
    arxiv="2305.12939",
)
class ALRSMAG(PolyakOptimizer):
    r"""Momentum SGD with one step size for all parameters, from the loss of each step.

    With the loss :math:`f`, its lower bound :math:`f^*` = ``lower_bound``, a parameter :math:`p`,
    its gradient :math:`g`, its buffer :math:`b` = ``momentum_buffer``, :math:`\mu` = ``momentum``,
    :math:`\lambda` = ``weight_decay`` and a sum over all parameters of all groups:

    .. math::

        b \leftarrow \mu b + g, \qquad
        \eta = \min\Bigl(\texttt{lr}, \frac{\max(0, f - f^*)}{c \sum \lVert b \rVert^2}\Bigr),
        \qquad p \leftarrow p - \eta \lambda\, p - \eta\, b

    Where the sum is 0, :math:`\eta` = ``lr``; there an infinite one moves nothing.
    ``last_step_size`` has the :math:`\eta` of the last step for each group. ``step`` needs the
    loss, or a closure that returns it.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter.
        lr: The largest step size, at least 0 and possibly infinite, or a tensor of one element.
        momentum: What the buffer keeps of itself, from 0 to below 1.
        weight_decay: Decoupled weight decay, at least 0.
        c: What divides the step size, above 0.
        lower_bound: The least loss there can be, a finite number.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one; ``step``
            got neither a closure nor a loss, or both, or a loss with dimensions.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import ALRSMAG
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> optimizer = ALRSMAG([weight], lr=1.0)
        >>> loss = weight.square().sum()
        >>> loss.backward()
        >>> optimizer.step(loss=loss)
        >>> weight.data, optimizer.last_step_size
        (tensor([ 0.5000, -1.0000,  1.5000]), [tensor(0.2500)])

    Deviations:
        The step size is 0 where the loss is below its bound.

    Reference:
        Xiaoyu Wang, Mikael Johansson, and Tong Zhang. Generalized Polyak Step Size for First Order
        Optimization with Momentum. 2023. arXiv:2305.12939.
    """

    _: KW_ONLY
    c: float = option(1.0, positive)

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"momentum_buffer": PARAMETER}

    @staticmethod
    def _measure(
        p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers
    ) -> dict[str, Tensor]:
        b = group["momentum"] * state["momentum_buffer"] + g
        return {"norm_sq": b.square().sum()}

    def _polyak(self, numbers: Numbers) -> Tensor:
        return (numbers["loss"] - numbers["lower_bound"]) / (numbers["c"] * numbers["norm_sq"])

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        b = state["momentum_buffer"].mul_(group["momentum"]).add_(g)
        return p - group["step_size"] * b
