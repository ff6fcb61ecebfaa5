"""AdamW: bias-corrected moments, with decoupled weight decay."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tilework import _torch
from tilework.catalog import implements
from tilework.optim._optimizer import (
    PARAMETER,
    DecoupledDecay,
    Numbers,
    Optimizer,
    Part,
    average_,
    bias_corrections,
    decay_rates,
    descend,
    flag,
    non_negative,
    option,
    rate,
)

__all__ = ["AdamW"]


@implements("Decoupled Weight Decay Regularization", year=2017, arxiv="1711.05101")
class AdamW(DecoupledDecay, Optimizer):
    r"""Adam with decoupled weight decay, in the place of :class:`torch.optim.AdamW`.

    With the parameter :math:`p`, its gradient :math:`g`, the moments :math:`m` = ``exp_avg`` and
    :math:`v` = ``exp_avg_sq``, the number :math:`t` of the parameter's steps, :math:`\eta` =
    ``lr``, :math:`\lambda` = ``weight_decay``, :math:`\epsilon` = ``eps`` and ``betas`` =
    :math:`(\beta_1, \beta_2)`:

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2 \\
        \hat m &= \frac{m}{1 - \beta_1^t}, \qquad \hat v = \frac{v}{1 - \beta_2^t} \\
        p &\leftarrow p - \eta \lambda\, p - \eta\, \frac{\hat m}{\sqrt{\hat v} + \epsilon}

    With ``amsgrad`` the largest :math:`v` so far, ``max_exp_avg_sq``, takes the place of
    :math:`v` in :math:`\hat v`. A ``state_dict`` of :class:`torch.optim.AdamW` can be loaded, and
    this one's there.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter; complex ones count
            as pairs of real ones.
        lr: Learning rate, at least 0, or a tensor of one element.
        betas: What the moments keep of themselves, each from 0 to below 1.
        eps: Added to the denominator, at least 0.
        weight_decay: Decoupled weight decay, at least 0.
        amsgrad: Whether the largest second moment is used.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import AdamW
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.8900, -1.8800,  2.8700])

    Deviations:
        The paper's decay :math:`\eta_t \lambda`, with the schedule :math:`\eta_t` alone, is
        ``decouple_lr=True``; torch's, the learning rate times :math:`\lambda`, is the default.
        ``fused`` and ``differentiable`` are not offered: torch's fused operator is used where it
        is faster.

    Reference:
        Ilya Loshchilov and Frank Hutter. Decoupled Weight Decay Regularization. 2017.
        arXiv:1711.05101.
    """

    lr: float | Tensor = option(1e-3, rate)
    betas: tuple[float, float] = option((0.9, 0.999), decay_rates)
    eps: float = option(1e-8, non_negative)
    weight_decay: float = option(1e-2, non_negative)
    amsgrad: bool = option(False, flag)

    _accepts_complex = True
    _kernel = "adamw"

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        names = ("exp_avg", "exp_avg_sq") + ("max_exp_avg_sq",) * group["amsgrad"]
        return dict.fromkeys(names, PARAMETER)

    def _numbers(self, group: Numbers) -> dict[str, Any]:
        correction1, correction2 = bias_corrections(group)
        root = correction2**0.5
        return {"step_size": group["lr"] / correction1 * root, "floor": group["eps"] * root}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        beta1, beta2 = group["betas"]
        m = average_(state["exp_avg"], g, beta1)
        v = average_(state["exp_avg_sq"], g * g, beta2)
        if group["amsgrad"]:
            v = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
        return descend(p, m, v.sqrt().add_(group["floor"]), group["step_size"])

    def _native(
        self, parts: Sequence[Part], steps: Sequence[Tensor], group: Numbers, maximize: bool
    ) -> bool:
        p = parts[0].parameter
        if p.device.type != "cpu" or p.dtype not in (torch.float32, torch.float64):
            return False  # elsewhere its counters would have to be on the device
        lr, (beta1, beta2) = group["lr"], group["betas"]
        _torch.fused_adamw(
            [part.parameter for part in parts],
            [part.gradient for part in parts],
            [[part.states[name] for part in parts] for name in parts[0].states],
            list(steps),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["decay"] / lr if group["decay"] else 0.0,
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=maximize,
        )
        return True
