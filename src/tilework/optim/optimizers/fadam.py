"""FAdam: Adam as a natural gradient with a diagonal empirical Fisher information."""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any

import torch
from torch import Tensor

from tilework.catalog import implements
from tilework.optim._optimizer import (
    PARAMETER,
    Numbers,
    Optimizer,
    average_,
    average_square_,
    decay_rates,
    move,
    non_negative,
    option,
    positive,
    rate,
    rms,
)

__all__ = ["FAdam"]


@implements(
    "FAdam: Adam is a natural gradient optimizer using diagonal empirical Fisher information",
    year=2024,
    arxiv="2405.12807",
)
class FAdam(Optimizer):
    r"""Fisher Adam: the momentum is of natural gradients, and weights decay along them too.

    With the parameter :math:`\theta`, its gradient :math:`g`, the Fisher information :math:`F` =
    ``fim``, the momentum :math:`m` = ``exp_avg``, the number :math:`t` of the parameter's steps,
    :math:`\eta` = ``lr``, :math:`\lambda` = ``weight_decay``, ``betas`` =
    :math:`(\beta_1, \beta_2)`, ``p`` and ``clip`` = :math:`c`:

    .. math::

        \beta &= \beta_2 \frac{1 - \beta_2^{t - 1}}{1 - \beta_2^t}, \qquad
        F \leftarrow \beta F + (1 - \beta)\, g^2 \\
        \epsilon &= \min(\texttt{eps}, \texttt{eps2} \cdot \operatorname{RMS}(g)), \qquad
        D = F^p + \epsilon^{2 p} \\
        h &= \operatorname{clip} \frac{g}{D}, \qquad
        w = \operatorname{clip} \frac{\theta}{D}, \qquad
        \operatorname{clip} x = \frac{x}{\max(1, \operatorname{RMS}(x) / c)} \\
        m &\leftarrow \beta_1 m + (1 - \beta_1)\, h, \qquad
        \theta \leftarrow \theta - \eta\, (m + \lambda w)

    where RMS is the root of the mean square of all elements of the parameter, and :math:`\epsilon`
    = ``eps`` where it is 0. Without epsilon, elements that never had a gradient stay.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter.
        lr: Learning rate, at least 0, or a tensor of one element.
        betas: What momentum and information keep of themselves, each from 0 to below 1.
        eps: The largest :math:`\epsilon`, at least 0.
        weight_decay: Decay along natural gradients, at least 0.
        eps2: The largest :math:`\epsilon` in units of the RMS of the gradient, at least 0.
        clip: The largest RMS of natural gradients, above 0.
        p: The exponent of the information, above 0.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import FAdam
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> optimizer = FAdam([weight], lr=1.0, weight_decay=0.0)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -1.9000,  2.9000])

    Reference:
        Dongseong Hwang. FAdam: Adam is a natural gradient optimizer using diagonal empirical Fisher
        information. 2024. arXiv:2405.12807.
    """

    lr: float | Tensor = option(1e-3, rate)
    betas: tuple[float, float] = option((0.9, 0.999), decay_rates)
    eps: float = option(1e-8, non_negative)
    weight_decay: float = option(1e-3, non_negative)
    _: KW_ONLY
    eps2: float = option(0.01, non_negative)
    clip: float = option(1.0, positive)
    p: float = option(0.5, positive)

    _elementwise = False

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"exp_avg": PARAMETER, "fim": PARAMETER}

    def _numbers(self, group: Numbers) -> dict[str, Any]:
        t, beta2 = group["t"], group["betas"][1]
        beta = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
        return {"beta2": beta, "is_root": group["p"] == 0.5}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        def clip(x: Tensor) -> Tensor:
            return x.div_((rms(x) / group["clip"]).clamp(min=1.0))

        fim = average_square_(state["fim"], g, group["beta2"])
        size = rms(g)
        eps = torch.where(size > 0, (group["eps2"] * size).clamp(max=group["eps"]), group["eps"])
        root = fim.sqrt() if group["is_root"] else fim ** group["p"]
        scale = root.add_(eps ** (2 * group["p"]))
        scale = scale.where(scale != 0, torch.inf)
        m = average_(state["exp_avg"], clip(g / scale), group["betas"][0])
        return move(move(p, m, group["lr"]), clip(p / scale), group["lr"] * group["weight_decay"])
