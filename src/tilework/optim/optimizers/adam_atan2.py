"""AdamATan2: Adam with an arctangent in the place of the division."""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any

import torch
from torch import Tensor

from tilework.catalog import implements
from tilework.optim._optimizer import (
    PARAMETER,
    DecoupledDecay,
    Numbers,
    Optimizer,
    average_,
    average_square_,
    bias_corrections,
    decay_rates,
    move,
    non_negative,
    option,
    rate,
)

__all__ = ["AdamATan2"]


@implements(
    "Scaling Exponents Across Parameterizations and Optimizers", year=2024, arxiv="2407.05872"
)
class AdamATan2(DecoupledDecay, Optimizer):
    r"""Adam without epsilon: invariant to the scale of gradients, however small they are.

    With the parameter :math:`p`, its gradient :math:`g`, the moments :math:`m` = ``exp_avg`` and
    :math:`v` = ``exp_avg_sq``, the number :math:`t` of the parameter's steps, :math:`\eta` =
    ``lr``, :math:`\lambda` = ``weight_decay``, ``a``, ``b`` and ``betas`` =
    :math:`(\beta_1, \beta_2)`:

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2 \\
        \hat m &= \frac{m}{1 - \beta_1^t}, \qquad \hat v = \frac{v}{1 - \beta_2^t} \\
        p &\leftarrow p - \eta \lambda\, p - \eta\, a \operatorname{atan2}(\hat m, b \sqrt{\hat v})

    where :math:`\operatorname{atan2}(0, 0) = 0`. No element moves by more than
    :math:`\eta\, a\, \pi / 2`. In float32 the squares of gradients below 1e-22 are lost; elements
    with such gradients alone move by that.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter; complex ones count
            as pairs of real ones.
        lr: Learning rate, at least 0, or a tensor of one element.
        betas: What the moments keep of themselves, each from 0 to below 1.
        weight_decay: Decoupled weight decay, at least 0.
        a: The factor of the arctangent, at least 0. With ``b=1`` the value :math:`4 / \pi` moves
            an element whose gradient is constant by :math:`\eta`.
        b: The factor of its denominator, at least 0. The larger, the closer to Adam.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import AdamATan2
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> optimizer = AdamATan2([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9003, -1.9003,  2.9003])

    Reference:
        Katie Everett, Lechao Xiao, Mitchell Wortsman, and others. Scaling Exponents Across
        Parameterizations and Optimizers. 2024. arXiv:2407.05872.
    """

    lr: float | Tensor = option(1e-4, rate)
    betas: tuple[float, float] = option((0.9, 0.99), decay_rates)
    weight_decay: float = option(0.0, non_negative)
    _: KW_ONLY
    a: float = option(1.27, non_negative)
    b: float = option(1.0, non_negative)

    _accepts_complex = True

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"exp_avg": PARAMETER, "exp_avg_sq": PARAMETER}

    def _numbers(self, group: Numbers) -> dict[str, Any]:
        correction1, correction2 = bias_corrections(group)
        return {"scale": group["b"] * correction1 / correction2**0.5}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        beta1, beta2 = group["betas"]
        m = average_(state["exp_avg"], g, beta1)
        v = average_square_(state["exp_avg_sq"], g, beta2)
        turn = torch.atan2(m, v.sqrt().mul_(group["scale"]))
        return move(p, turn, group["lr"] * group["a"])
