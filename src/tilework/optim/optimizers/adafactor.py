"""Adafactor: second moments of rows and columns in the place of those of elements."""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any

from torch import Tensor

from tilework.catalog import implements
from tilework.optim._optimizer import (
    PARAMETER,
    Numbers,
    Optimizer,
    average,
    average_,
    dot,
    flag,
    non_negative,
    non_positive,
    option,
    optional,
    pair,
    positive,
    rate,
    rms,
    where,
)
from tilework.optim._optimizer import decay_rate as kept

__all__ = ["Adafactor"]


@implements(
    "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", year=2018, arxiv="1804.04235"
)
class Adafactor(Optimizer):
    r"""Adafactor: for an n by m matrix, n + m numbers of state; steps relative to the parameter.

    With the parameter :math:`p`, its gradient :math:`g`, the number :math:`t` of the parameter's
    steps, ``eps`` = :math:`(\epsilon_1, \epsilon_2)` and
    :math:`\beta = 1 - t^{\texttt{decay\_rate}}`, a matrix has the moments :math:`R` =
    ``exp_avg_sq_row`` and :math:`C` = ``exp_avg_sq_col``, the means of :math:`g^2` over columns and
    rows:

    .. math::

        R_i &\leftarrow \beta R_i + (1 - \beta) \operatorname{mean}_j (g_{ij}^2 + \epsilon_1),
        \qquad
        C_j \leftarrow \beta C_j + (1 - \beta) \operatorname{mean}_i (g_{ij}^2 + \epsilon_1) \\
        u_{ij} &= \frac{g_{ij}}{\sqrt{R_i C_j / \operatorname{mean}_k R_k}}, \qquad
        u \leftarrow \frac{u}{\max(1, \operatorname{RMS}(u) / d)} \\
        \alpha &= \rho \max(\epsilon_2, \operatorname{RMS}(p)), \qquad
        p \leftarrow p - \lambda \alpha\, p - \alpha u

    where RMS is the root of the mean square of all elements, :math:`d` = ``clip_threshold`` and
    :math:`\lambda` = ``weight_decay``. With ``relative_step``
    :math:`\rho = \min(10^{-2}, 1 / \sqrt t)`, of which ``warmup_init`` makes
    :math:`\min(10^{-6}\, t, 1 / \sqrt t)`; otherwise :math:`\rho` = ``lr``. Without
    ``scale_parameter`` :math:`\alpha = \rho`. With ``beta1`` the parameter moves by ``exp_avg``, a
    running mean of :math:`\alpha u`.

    More than two dimensions are matrices of the last two, each with moments of its own; a tensor of
    fewer has ``exp_avg_sq``, a moment of each element.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter.
        lr: Learning rate, at least 0, or a tensor of one element; None with ``relative_step``.
        eps: Added to squared gradients; and the least RMS of a parameter; both at least 0.
        weight_decay: Decay in each step, in units of :math:`\alpha`, at least 0.
        clip_threshold: The largest RMS of :math:`u`, above 0.
        decay_rate: The exponent of :math:`\beta`, at most 0.
        beta1: What the mean of updates keeps of itself, from 0 to below 1; None is without it.
        scale_parameter: Whether steps are relative to the RMS of the parameter.
        relative_step: Whether the learning rate is a function of :math:`t`.
        warmup_init: Whether that function starts small.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one; ``lr`` is
            given with ``relative_step``, or lacks without it; or ``warmup_init`` comes without it.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import Adafactor
        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        >>> optimizer = Adafactor([weight])
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['exp_avg_sq_col', 'exp_avg_sq_row', 'step']

    Deviations:
        The paper has no weight decay. Here it is in units of :math:`\alpha`, as in the usual ports;
        in :class:`torch.optim.Adafactor`, another algorithm, in units of the learning rate.

    Reference:
        Noam Shazeer and Mitchell Stern. Adafactor: Adaptive Learning Rates with Sublinear Memory
        Cost. 2018. arXiv:1804.04235.
    """

    lr: float | Tensor | None = option(None, optional(rate))
    eps: tuple[float, float] = option((1e-30, 1e-3), pair(non_negative))
    weight_decay: float = option(0.0, non_negative)
    _: KW_ONLY
    clip_threshold: float = option(1.0, positive)
    decay_rate: float = option(-0.8, non_positive)
    beta1: float | None = option(None, optional(kept))
    scale_parameter: bool = option(True, flag)
    relative_step: bool = option(True, flag)
    warmup_init: bool = option(False, flag)

    _elementwise = False

    def _check(self, group: Mapping[str, Any]) -> None:
        name, relative = type(self).__name__, group["relative_step"]
        if relative and group["lr"] is not None:
            raise ValueError(f"{name}: lr must be None with relative_step=True")
        if not relative and group["lr"] is None:
            raise ValueError(f"{name}: lr must be given with relative_step=False")
        if not relative and group["warmup_init"]:
            raise ValueError(f"{name}: warmup_init must be False with relative_step=False")

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        states: dict[str, Any] = {"exp_avg_sq": PARAMETER}
        if parameter.dim() >= 2:
            *leading, rows, columns = parameter.shape
            states = {"exp_avg_sq_row": (*leading, rows), "exp_avg_sq_col": (*leading, columns)}
        return states if group["beta1"] is None else states | {"exp_avg": PARAMETER}

    def _numbers(self, group: Numbers) -> dict[str, Any]:
        t, rho = group["t"], group["lr"]
        if group["relative_step"]:
            start, later = 1e-6 * t if group["warmup_init"] else 1e-2, t**-0.5
            rho = where(later < start, later, start)
        return {"rho": rho, "beta2": 1 - t ** group["decay_rate"]}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        beta2, (eps1, eps2) = group["beta2"], group["eps"]
        if "exp_avg_sq" in state:
            u = g * average_(state["exp_avg_sq"], g * g + eps1, beta2).rsqrt()
        else:
            rows, columns = g.dim() - 2, g.dim() - 1
            of_rows = dot(g, g, (columns,)).squeeze(columns) / g.shape[columns] + eps1
            of_columns = dot(g, g, (rows,)).squeeze(rows) / g.shape[rows] + eps1
            row = average(state["exp_avg_sq_row"], of_rows, beta2)
            column = average(state["exp_avg_sq_col"], of_columns, beta2)
            state["exp_avg_sq_row"], state["exp_avg_sq_col"] = row, column
            row = row / row.mean(-1, keepdim=True)
            u = (g * row.rsqrt().unsqueeze(-1)).mul_(column.rsqrt().unsqueeze(-2))
        alpha = group["rho"]
        if group["scale_parameter"]:
            alpha = alpha * rms(p).clamp(min=eps2)
        size = alpha / (rms(u) / group["clip_threshold"]).clamp(min=1.0)
        u = u.mul_(size)
        if "exp_avg" in state:
            u = average_(state["exp_avg"], u, group["beta1"])
        return p * (1 - group["weight_decay"] * alpha) - u
