"""StableSPAM: Adam on gradients without spikes, whose moments start anew now and then."""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any, ClassVar

import torch
from torch import Tensor

from tilework.catalog import implements
from tilework.optim._optimizer import (
    PARAMETER,
    SCALAR,
    DecoupledDecay,
    Numbers,
    Optimizer,
    average_,
    average_square_,
    bias_corrections,
    cos,
    count,
    decay_rate,
    decay_rates,
    descend,
    exact,
    fraction,
    largest,
    length,
    non_negative,
    option,
    optional,
    rate,
    reset_,
    where,
)

__all__ = ["StableSPAM"]


@implements(
    "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam",
    year=2025,
    arxiv="2502.17055",
)
class StableSPAM(DecoupledDecay, Optimizer):
    r"""Adam behind two filters of the gradient, with moments that are reset.

    With the parameter :math:`p`, its gradient :math:`g`, the number :math:`t` of the parameter's
    steps, the scalars :math:`A` = ``max_ema``, :math:`M` = ``norm_ema`` and :math:`N` =
    ``norm_sq_ema``, :math:`\gamma_1` = ``gamma1``, :math:`\gamma_2` = ``gamma2``, :math:`\theta` =
    ``theta`` and :math:`\epsilon` = ``eps``, elements larger than the largest usually is are cut,
    and the gradient gets the norm that it usually has:

    .. math::

        A &\leftarrow \theta A + (1 - \theta) \max \lvert g \rvert, \qquad
        \hat A = \frac{A}{1 - \theta^t}, \qquad
        g_i \leftarrow g_i \frac{\hat A}{\max \lvert g \rvert}
            \text{ where } \lvert g_i \rvert > \hat A \\
        M &\leftarrow \gamma_1 M + (1 - \gamma_1) \lVert g \rVert, \qquad
        N \leftarrow \gamma_2 N + (1 - \gamma_2) \lVert g \rVert^2, \qquad
        g \leftarrow \frac{g}{\lVert g \rVert}
            \cdot \frac{M / (1 - \gamma_1^t)}{\sqrt{N / (1 - \gamma_2^t)} + \epsilon}

    Then follows a step of Adam, with the moments :math:`m` = ``exp_avg`` and :math:`v` =
    ``exp_avg_sq``, :math:`\eta` = ``lr``, :math:`\lambda` = ``weight_decay`` and ``betas`` =
    :math:`(\beta_1, \beta_2)`. In each ``reset_interval``-th step :math:`m`, :math:`v` and their
    counter :math:`k` = ``moment_step`` are 0 before it:

    .. math::

        k &\leftarrow k + 1, \qquad m \leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2 \\
        p &\leftarrow p - \eta \lambda\, p
            - \eta\, \frac{m / (1 - \beta_1^k)}{\sqrt{v / (1 - \beta_2^k)} + \epsilon}

    With ``total_steps`` = :math:`T`, both :math:`\beta_1` and :math:`\gamma_1` are multiplied by a
    cosine from 1 towards ``eta_min``, :math:`q = \texttt{eta\_min} + (1 - \texttt{eta\_min})
    (1 + \cos(\pi \min(t, T) / (T + 1))) / 2`.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter.
        lr: Learning rate, at least 0, or a tensor of one element.
        betas: What the moments keep of themselves, each from 0 to below 1.
        eps: Added to both denominators, at least 0.
        weight_decay: Decoupled weight decay, at least 0.
        gamma1: What the mean norm keeps of itself, from 0 to below 1.
        gamma2: What the mean squared norm keeps of itself, from 0 to below 1.
        theta: What the mean of the largest element keeps of itself, from 0 to below 1.
        reset_interval: The number of steps from one reset to the next, at least 0; 0 is none.
        total_steps: The number of steps of the cosine, at least 1; None is without it.
        eta_min: What the cosine falls to, from 0 to 1.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import StableSPAM
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> optimizer = StableSPAM([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000,  2.9000])

    Deviations:
        The released code corrects the bias of :math:`A`, :math:`M` and :math:`N` by the counter of
        the moments, so that after a reset :math:`\hat A` is hundreds of times too large and nothing
        is cut; it steps with the old moments when it resets, and overwrites the gradient. Here
        these means count all steps, the reset comes first, and the gradient is left alone.

    Reference:
        Tianjin Huang, Haotian Hu, Zhenyu Zhang, and others. Stable-SPAM: How to Train in 4-Bit More
        Stably than 16-Bit Adam. 2025. arXiv:2502.17055.
    """

    lr: float | Tensor = option(1e-3, rate)
    betas: tuple[float, float] = option((0.9, 0.999), decay_rates)
    eps: float = option(1e-8, non_negative)
    weight_decay: float = option(0.0, non_negative)
    _: KW_ONLY
    gamma1: float = option(0.7, decay_rate)
    gamma2: float = option(0.9, decay_rate)
    theta: float = option(0.999, decay_rate)
    reset_interval: int = option(1000, count(0))
    total_steps: int | None = option(None, optional(count(1)))
    eta_min: float = option(0.5, fraction)

    _elementwise = False
    _dtypes: ClassVar[Mapping[str, torch.dtype]] = {"moment_step": torch.float32}

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        scalars = ("moment_step", "max_ema", "norm_ema", "norm_sq_ema")
        return {"exp_avg": PARAMETER, "exp_avg_sq": PARAMETER} | dict.fromkeys(scalars, SCALAR)

    def _numbers(self, group: Numbers) -> dict[str, Any]:
        t, (beta1, beta2), gamma1 = group["t"], group["betas"], group["gamma1"]
        if (total := group["total_steps"]) is not None:
            angle = math.pi / (total + 1) * where(t < total, t, total)
            q = group["eta_min"] + (1 - group["eta_min"]) * (1 + cos(angle)) / 2
            beta1, gamma1 = q * beta1, q * gamma1
        interval = group["reset_interval"]
        return {
            "betas": (beta1, beta2),
            "gamma1": gamma1,
            "of_max": 1 - group["theta"] ** t,
            "of_norm": 1 - gamma1**t,
            "of_norm_sq": 1 - group["gamma2"] ** t,
            "resets": where(interval > 0 and t % interval == 0, 1.0, 0.0),
        }

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        peak = largest(g)
        usual = average_(state["max_ema"], peak, group["theta"]) / group["of_max"]
        g = torch.where(g.abs() > usual, g * (usual / peak), g)

        norm = length(g)
        mean = average_(state["norm_ema"], norm, group["gamma1"]) / group["of_norm"]
        square = average_(state["norm_sq_ema"], norm * norm, group["gamma2"]) / group["of_norm_sq"]
        c = mean / (square.sqrt() + group["eps"])
        g = g * torch.where(norm > 0, c / norm, 1.0)

        for name in ("exp_avg", "exp_avg_sq", "moment_step"):
            reset_(state[name], group["resets"] == 1)
        k = state["moment_step"].add_(1)
        beta1, beta2 = group["betas"]
        m = average_(state["exp_avg"], g, beta1)
        v = average_square_(state["exp_avg_sq"], g, beta2)
        correction1, correction2 = bias_corrections({"betas": group["betas"], "t": exact(k)})
        scale = (v / correction2).sqrt_().add_(group["eps"])
        return descend(p, m, scale, group["lr"] / correction1)
