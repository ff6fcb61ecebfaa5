"""AdaBelief: steps are long where gradients are as expected."""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any

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
    descend,
    flag,
    non_negative,
    option,
    rate,
    where,
)

__all__ = ["AdaBelief"]


@implements(
    "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients",
    year=2020,
    arxiv="2010.07468",
)
class AdaBelief(DecoupledDecay, Optimizer):
    r"""Adam with the variance of the gradient about its mean in the place of its square.

    With the parameter :math:`p`, its gradient :math:`g`, the mean :math:`m` = ``exp_avg``, the
    variance :math:`s` = ``exp_avg_var``, the number :math:`t` of the parameter's steps,
    :math:`\eta` = ``lr``, :math:`\lambda` = ``weight_decay``, :math:`\epsilon` = ``eps`` and
    ``betas`` = :math:`(\beta_1, \beta_2)`:

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad
        s \leftarrow \beta_2 s + (1 - \beta_2) (g - m)^2 + \epsilon \\
        \hat m &= \frac{m}{1 - \beta_1^t}, \qquad \hat s = \frac{s}{1 - \beta_2^t} \\
        p &\leftarrow p - \eta \lambda\, p - \eta\, r \frac{\hat m}{\sqrt{\hat s} + \epsilon}

    where :math:`r = 1`. With ``rectify``, as in RAdam,

    .. math::

        \rho_\infty = \frac{2}{1 - \beta_2} - 1, \qquad
        \rho = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad
        r = \sqrt{\frac{(\rho - 4) (\rho - 2) \rho_\infty}
            {(\rho_\infty - 4) (\rho_\infty - 2) \rho}}

    and where :math:`\rho \le 5` the step is :math:`\eta\, \hat m`. Without ``weight_decouple``,
    :math:`\lambda p` is added to the gradient instead.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter; complex ones count
            as pairs of real ones.
        lr: Learning rate, at least 0, or a tensor of one element.
        betas: What mean and variance keep of themselves, each from 0 to below 1.
        eps: Added to the variance in each step, and to the denominator, at least 0.
        weight_decay: Weight decay, at least 0.
        weight_decouple: Whether weights decay apart from the gradient.
        rectify: Whether early steps, when the variance is not known well, are shortened.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one; or
            ``decouple_lr`` comes without ``weight_decouple``.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import AdaBelief
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> optimizer = AdaBelief([weight], lr=0.09)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000,  2.9000])

    Deviations:
        ``rectify`` is False, as in the paper. The released code rectifies by default, and there
        epsilon enters a rectified step before the bias of the variance is corrected.

    Reference:
        Juntang Zhuang, Tommy Tang, Yifan Ding, and others. AdaBelief Optimizer: Adapting Stepsizes
        by the Belief in Observed Gradients. 2020. arXiv:2010.07468.
    """

    lr: float | Tensor = option(1e-3, rate)
    betas: tuple[float, float] = option((0.9, 0.999), decay_rates)
    eps: float = option(1e-16, non_negative)
    weight_decay: float = option(0.0, non_negative)
    _: KW_ONLY
    weight_decouple: bool = option(True, flag)
    rectify: bool = option(False, flag)

    _accepts_complex = True
    _kernel = "adabelief"

    def _check(self, group: Mapping[str, Any]) -> None:
        if group["decouple_lr"] and not group["weight_decouple"]:
            raise ValueError(
                f"{type(self).__name__}: decouple_lr must be False with weight_decouple=False"
            )

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"exp_avg": PARAMETER, "exp_avg_var": PARAMETER}

    def _decay(self, group: Numbers) -> Any:
        return super()._decay(group) if group["weight_decouple"] else None

    def _numbers(self, group: Numbers) -> dict[str, Any]:
        t, beta2 = group["t"], group["betas"][1]
        correction1, correction2 = bias_corrections(group)
        step_size, adapts = group["lr"] / correction1, 1.0
        if group["rectify"]:
            limit = 2 / (1 - beta2) - 1
            rho = limit - 2 * t * beta2**t / correction2
            adapts = where(rho > 5, 1.0, 0.0)
            rho, limit = where(rho > 5, rho, 5.0), max(limit, 5.0)  # else what follows is not real
            r = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
            step_size = step_size * where(adapts == 1, r, 1.0)
        return {"step_size": step_size, "adapts": adapts, "root": correction2**0.5}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        beta1, beta2 = group["betas"]
        if not group["weight_decouple"]:
            g = g + group["weight_decay"] * p
        m = average_(state["exp_avg"], g, beta1)
        s = average_square_(state["exp_avg_var"], g - m, beta2).add_(group["eps"])
        scale = s.sqrt().div_(group["root"]).add_(group["eps"])
        scale = where(group["adapts"] == 1, scale, scale.new_ones(()))
        return descend(p, m, scale, group["step_size"])
