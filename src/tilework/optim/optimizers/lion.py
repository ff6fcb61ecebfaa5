"""Lion: the sign of an interpolated momentum."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tilework.catalog import implements
from tilework.optim._optimizer import (
    PARAMETER,
    DecoupledDecay,
    Numbers,
    Optimizer,
    average,
    average_,
    decay_rates,
    move,
    non_negative,
    option,
    rate,
)

__all__ = ["Lion"]


@implements("Symbolic Discovery of Optimization Algorithms", year=2023, arxiv="2302.06675")
class Lion(DecoupledDecay, Optimizer):
    r"""Lion: each element moves by the learning rate, against the sign of a momentum.

    With the parameter :math:`p`, its gradient :math:`g`, the momentum :math:`m` = ``exp_avg``,
    :math:`\eta` = ``lr``, :math:`\lambda` = ``weight_decay`` and ``betas`` =
    :math:`(\beta_1, \beta_2)`:

    .. math::

        c = \beta_1 m + (1 - \beta_1)\, g, \qquad
        p \leftarrow p - \eta \lambda\, p - \eta \operatorname{sign} c, \qquad
        m \leftarrow \beta_2 m + (1 - \beta_2)\, g

    It holds one state for each element, which ``state_dtype=torch.bfloat16`` halves as the paper
    does. A learning rate 3 to 10 times smaller than AdamW's, with a weight decay larger by as much,
    is what the paper takes.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter; complex ones count
            as pairs of real ones.
        lr: Learning rate, at least 0, or a tensor of one element.
        betas: What the direction and the momentum keep of the momentum, each from 0 to below 1.
        weight_decay: Decoupled weight decay, at least 0.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import Lion
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> optimizer = Lion([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000,  2.9000])

    Reference:
        Xiangning Chen, Chen Liang, Da Huang, and others. Symbolic Discovery of Optimization
        Algorithms. 2023. arXiv:2302.06675.
    """

    lr: float | Tensor = option(1e-4, rate)
    betas: tuple[float, float] = option((0.9, 0.99), decay_rates)
    weight_decay: float = option(0.0, non_negative)

    _accepts_complex = True
    _kernel = "lion"

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"exp_avg": PARAMETER}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        beta1, beta2 = group["betas"]
        direction = average(state["exp_avg"], g, beta1).sign_()
        average_(state["exp_avg"], g, beta2)
        return move(p, direction, group["lr"])
