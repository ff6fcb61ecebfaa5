"""LAMB: Adam's direction, as long for each tensor as its weights are."""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any

from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.optim._optimizer import (
    PARAMETER,
    Numbers,
    Optimizer,
    average_,
    average_square_,
    bias_corrections,
    decay_rates,
    flag,
    length,
    move,
    non_negative,
    option,
    optional,
    pair,
    rate,
)

__all__ = ["LAMB"]


@implements("A Large Batch Optimizer Reality Check", year=2021, arxiv="2102.06356")
class LAMB(Optimizer):
    r"""Adam with a trust ratio for each tensor, for large batches.

    With the parameter :math:`p`, its gradient :math:`g`, the moments :math:`m` = ``exp_avg`` and
    :math:`v` = ``exp_avg_sq``, the number :math:`t` of the parameter's steps, :math:`\eta` =
    ``lr``, :math:`\lambda` = ``weight_decay``, :math:`\epsilon` = ``eps``, ``betas`` =
    :math:`(\beta_1, \beta_2)` and norms of whole tensors:

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2)\, g^2 \\
        u &= \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \lambda p, \qquad
        p \leftarrow p - \eta\, \frac{\phi(\lVert p \rVert)}{\lVert u \rVert}\, u

    :math:`\phi` clamps to ``clip_norm``. The ratio is 1 where :math:`\lVert p \rVert` or
    :math:`\lVert u \rVert` is 0. With ``exclude_1d``, tensors of at most one dimension, such as
    biases and gains, follow Adam: the ratio is 1, and there is no decay.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter.
        lr: Learning rate, at least 0, or a tensor of one element.
        betas: What the moments keep of themselves, each from 0 to below 1.
        eps: Added to the denominator, at least 0.
        weight_decay: Weight decay, at least 0, inside of the ratio.
        clip_norm: The least and the largest norm of weights that counts; None takes all.
        bias_correction: Whether the moments are divided by :math:`1 - \beta^t`.
        exclude_1d: Whether tensors of at most one dimension follow Adam.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import LAMB
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = LAMB([weight], lr=0.1)
        >>> (7 * weight[0, 1]).backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([[3.0000, 3.5000]])

    Reference:
        Zachary Nado, Justin M. Gilmer, Christopher J. Shallue, Rohan Anil, and George E. Dahl. A
        Large Batch Optimizer Reality Check: Traditional, Generic Optimizers Suffice Across Batch
        Sizes. 2021. arXiv:2102.06356.
    """

    lr: float | Tensor = option(1e-3, rate)
    betas: tuple[float, float] = option((0.9, 0.999), decay_rates)
    eps: float = option(1e-6, non_negative)
    weight_decay: float = option(0.0, non_negative)
    _: KW_ONLY
    clip_norm: tuple[float, float] | None = option(None, optional(pair(non_negative)))
    bias_correction: bool = option(True, flag)
    exclude_1d: bool = option(True, flag)

    _elementwise = False

    def _check(self, group: Mapping[str, Any]) -> None:
        clip_norm = group["clip_norm"]
        if clip_norm is not None and clip_norm[0] > clip_norm[1]:
            raise _checks.bad_value(
                type(self).__name__, "clip_norm", "a norm and one at least as large", clip_norm
            )

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"exp_avg": PARAMETER, "exp_avg_sq": PARAMETER}

    def _numbers(self, group: Numbers) -> dict[str, Any]:
        correction1, correction2 = (
            bias_corrections(group) if group["bias_correction"] else (1.0, 1.0)
        )
        return {"correction": correction1, "root": correction2**0.5}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        beta1, beta2 = group["betas"]
        m = average_(state["exp_avg"], g, beta1)
        v = average_square_(state["exp_avg_sq"], g, beta2)
        u = m / v.sqrt().div_(group["root"]).add_(group["eps"]).mul_(group["correction"])
        if p.dim() <= 1 and group["exclude_1d"]:
            return move(p, u, group["lr"])
        u = move(u, p, -group["weight_decay"])
        size, change = length(p), length(u)
        clipped = size if group["clip_norm"] is None else size.clamp(*group["clip_norm"])
        ratio = (clipped / change).where((size > 0) & (change > 0), 1.0)
        return move(p, u, group["lr"] * ratio)
