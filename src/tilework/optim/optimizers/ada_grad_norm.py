"""AdaGradNorm: one learning rate, divided by the root of all squared gradients so far."""

from typing import Any

from torch import Tensor

from tilework.catalog import implements
from tilework.optim._optimizer import (
    DecoupledDecay,
    Numbers,
    Optimizer,
    non_negative,
    option,
    rate,
)

__all__ = ["AdaGradNorm"]


@implements(
    "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods",
    year=2024,
    arxiv="2402.11215",
)
class AdaGradNorm(DecoupledDecay, Optimizer):
    r"""AdaGrad with a single accumulator for each group of parameters.

    With a parameter :math:`p`, the gradients :math:`g_l` of all parameters of its group, the
    group's accumulator :math:`s` = ``sum_sq``, :math:`\eta` = ``lr``, :math:`\lambda` =
    ``weight_decay`` and :math:`\epsilon` = ``eps``:

    .. math::

        s \leftarrow s + \sum_l \lVert g_l \rVert^2, \qquad
        p \leftarrow p - \eta \lambda\, p - \frac{\eta}{\sqrt{s} + \epsilon}\, g

    The accumulator is an entry of the group, a tensor without dimensions, and is saved with it.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter.
        lr: Learning rate, at least 0, or a tensor of one element.
        eps: Added to the denominator, at least 0.
        weight_decay: Decoupled weight decay, at least 0.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import AdaGradNorm
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = AdaGradNorm([weight], lr=0.5)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.7000, 1.6000])
        >>> optimizer.param_groups[0]["sum_sq"]
        tensor(25.)

    Deviations:
        The released code keeps one accumulator for each output row, and adds its decay to the
        gradient.

    Reference:
        Tim Tsz-Kit Lau, Han Liu, and Mladen Kolar. AdAdaGrad: Adaptive Batch Size Schemes for
        Adaptive Gradient Methods. 2024. arXiv:2402.11215.
    """

    lr: float | Tensor = option(1e-2, rate)
    eps: float = option(1e-10, non_negative)
    weight_decay: float = option(0.0, non_negative)

    _measures_each_group = True
    _group_states = ("sum_sq",)

    @staticmethod
    def _measure(
        p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers
    ) -> dict[str, Tensor]:
        return {"grad_sq": g.square().sum()}

    def _measured(self, group: dict[str, Any], numbers: Numbers) -> dict[str, Any]:
        return {"sum_sq": group["sum_sq"].add_(numbers["grad_sq"])}

    def _numbers(self, group: Numbers) -> dict[str, Any]:
        return {"step_size": group["lr"] / (group["sum_sq"].sqrt() + group["eps"])}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        return p - group["step_size"] * g
