"""ALRSHB: a Polyak step size for the heavy ball."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tilework.catalog import implements
from tilework.optim._optimizer import PARAMETER, Numbers
from tilework.optim.optimizers._polyak import PolyakOptimizer

__all__ = ["ALRSHB"]


@implements(
    "Generalized Polyak Step Size for First Order Optimization with Momentum",
    year=2023,
    arxiv="2305.12939",
)
class ALRSHB(PolyakOptimizer):
    r"""The heavy ball with one step size for all parameters, from the loss of each step.

    With the loss :math:`f`, its lower bound :math:`f^*` = ``lower_bound``, a parameter :math:`p`,
    its gradient :math:`g`, its last change :math:`\delta` = ``delta``, :math:`\mu` = ``momentum``,
    :math:`\lambda` = ``weight_decay`` and sums over all parameters of all groups:

    .. math::

        \eta = \frac{f - f^* + \mu \sum \langle g, \delta \rangle}{\sum \lVert g \rVert^2}, \qquad
        \delta \leftarrow \mu \delta - \eta\, g, \qquad
        p \leftarrow p - \eta \lambda\, p + \delta

    with :math:`\eta` clamped to ``[0, lr]``. Where the sum of squares is 0, :math:`\eta` = ``lr``;
    there an infinite one moves nothing. ``last_step_size`` has the :math:`\eta` of the last step
    for each group. ``step`` needs the loss, or a closure that returns it.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter.
        lr: The largest step size, at least 0 and possibly infinite, or a tensor of one element.
        momentum: What the change keeps of itself, from 0 to below 1.
        weight_decay: Decoupled weight decay, at least 0.
        lower_bound: The least loss there can be, a finite number.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one; ``step``
            got neither a closure nor a loss, or both, or a loss with dimensions.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import ALRSHB
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> optimizer = ALRSHB([weight], lr=1.0)
        >>> loss = weight.square().sum()
        >>> loss.backward()
        >>> optimizer.step(loss=loss)
        >>> weight.data, optimizer.last_step_size
        (tensor([ 0.5000, -1.0000,  1.5000]), [tensor(0.2500)])

    Deviations:
        The step size is at least 0, which it could be below where the loss is below its bound or
        the ball rolls along the gradient, and at most ``lr``.

    Reference:
        Xiaoyu Wang, Mikael Johansson, and Tong Zhang. Generalized Polyak Step Size for First Order
        Optimization with Momentum. 2023. arXiv:2305.12939.
    """

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"delta": PARAMETER}

    @staticmethod
    def _measure(
        p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers
    ) -> dict[str, Tensor]:
        return {"norm_sq": g.square().sum(), "inner": (g * state["delta"]).sum()}

    def _polyak(self, numbers: Numbers) -> Tensor:
        gap = numbers["loss"] - numbers["lower_bound"]
        return (gap + numbers["momentum"] * numbers["inner"]) / numbers["norm_sq"]

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        return p + state["delta"].mul_(group["momentum"]).sub_(group["step_size"] * g)
