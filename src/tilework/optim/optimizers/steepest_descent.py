"""SteepestDescent: momentum, and the direction of steepest descent under a norm."""

from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Any

from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.optim._optimizer import (
    PARAMETER,
    DecoupledDecay,
    Numbers,
    Optimizer,
    average,
    check_nesterov,
    count,
    decay_rate,
    flag,
    non_negative,
    of_whole,
    one_of,
    option,
    positive,
    rate,
)
from tilework.optim.gradients.dual_direction import METHODS, NORMS, OF_MATRICES, dual_direction
from tilework.optim.gradients.newton_schulz import QUINTIC

__all__ = ["SteepestDescent"]


def _coefficients(optimizer: str, name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise _checks.bad_value(optimizer, name, "three numbers", value)
    for index, coefficient in enumerate(value):
        _checks.finite(optimizer, f"{name}[{index}]", coefficient)
    return tuple(map(float, value))


@implements("Old Optimizer, New Norm: An Anthology", year=2024, arxiv="2409.20325")
class SteepestDescent(DecoupledDecay, Optimizer):
    r"""Steepest descent under a chosen norm; with the spectral one and momentum it is Muon.

    With the parameter :math:`p`, its gradient :math:`g`, the buffer :math:`b` =
    ``momentum_buffer``, :math:`\mu` = ``momentum``, :math:`\eta` = ``lr``, :math:`\lambda` =
    ``weight_decay``, :math:`s` = ``sensitivity``, and the direction :math:`T` and dual norm
    :math:`D` that :func:`dual_direction` gives for ``norm``:

    .. math::

        b &\leftarrow \mu b + (1 - \mu)\, g, \qquad
        u = \begin{cases} \mu b + (1 - \mu)\, g & \text{with } \texttt{nesterov} \\
        b & \text{otherwise} \end{cases} \\
        (T, D) &= \texttt{dual\_direction}(u), \qquad
        p \leftarrow p - \eta \lambda\, p - \eta\, h\, T \\
        h &= \begin{cases} 1 / s & \text{for } \texttt{scale='unit'} \\
        D / s^2 & \text{for } \texttt{'dual'} \\
        \frac{1}{s} \sum_l D_l / s_l & \text{for } \texttt{'modular'} \end{cases}

    where the sum runs over all parameters of all groups. Without momentum :math:`u = g`, and there
    is no buffer. ``'dual'`` minimizes
    :math:`\langle u, \Delta \rangle + s^2 \lVert \Delta \rVert^2 / (2 \eta)` for each tensor,
    ``'modular'`` jointly, under the norm :math:`\max_l s_l \lVert \Delta_l \rVert`; it takes the
    directions twice, to store none.

    Args:
        params: Parameters, groups of them, or pairs of a name and a parameter.
        lr: Learning rate, at least 0, or a tensor of one element.
        momentum: What the buffer keeps of itself, from 0 to below 1.
        weight_decay: Decoupled weight decay, at least 0.
        norm: ``'linf'``, ``'l2'``, or, for parameters of at least 2 dimensions, ``'spectral'``,
            ``'rms'`` or ``'embedding'``, as in :func:`dual_direction`.
        method: ``'newton_schulz'`` or ``'svd'``, as there.
        steps: Of :func:`newton_schulz`, at least 0.
        coefficients: Of :func:`newton_schulz`.
        eps: Of :func:`newton_schulz`, above 0.
        nesterov: Whether the step looks ahead; needs a momentum.
        scale: ``'unit'``, ``'dual'`` or ``'modular'``.
        sensitivity: Of the loss to the parameters of the group, above 0.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one; or a
            parameter has too few dimensions for the norm.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import SteepestDescent
        >>> weight = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = SteepestDescent([weight], lr=0.5, method="svd")
        >>> weight.grad = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[ 1.0000, -0.5000],
                [-0.5000,  1.0000]])

    Reference:
        Jeremy Bernstein, Laker Newhouse. Old Optimizer, New Norm: An Anthology. 2024.
        arXiv:2409.20325.
    """

    lr: float | Tensor = option(1e-3, rate)
    momentum: float = option(0.0, decay_rate)
    weight_decay: float = option(0.0, non_negative)
    _: KW_ONLY
    norm: str = option("spectral", one_of(*NORMS))
    method: str = option("newton_schulz", one_of(*METHODS))
    steps: int = option(5, count(0))
    coefficients: tuple[float, float, float] = option(QUINTIC, _coefficients)
    eps: float = option(1e-7, positive)
    nesterov: bool = option(False, flag)
    scale: str = option("unit", one_of("unit", "dual", "modular"))
    sensitivity: float = option(1.0, positive)

    _elementwise = False
    _constants = ("coefficients", "eps")

    def _check(self, group: Mapping[str, Any]) -> None:
        check_nesterov(type(self).__name__, group)

    def _check_parameter(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        if group["norm"] in OF_MATRICES and parameter.dim() < 2:
            accepted = f"of at least 2 dimensions with norm={group['norm']!r}"
            raise _checks.bad_value(self._name, "params", accepted, parameter)

    def _states(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"momentum_buffer": PARAMETER} if group["momentum"] else {}

    def _is_global(self) -> bool:
        return any(group["scale"] == "modular" for group in self.param_groups)

    @staticmethod
    def _measure(
        p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers
    ) -> dict[str, Tensor]:
        _, dual = _direction(g, state, group)
        return {"modular": dual / group["sensitivity"]}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        direction, dual = _direction(g, state, group)
        size = 1 / group["sensitivity"]
        if group["scale"] != "unit":
            size = size * (dual * size if group["scale"] == "dual" else group["modular"])
        return p - group["lr"] * size * direction


def _direction(g: Tensor, state: dict[str, Tensor], group: Numbers) -> tuple[Tensor, Tensor]:
    u = g
    if "momentum_buffer" in state:
        u = state["momentum_buffer"] = average(state["momentum_buffer"], g, group["momentum"])
        if group["nesterov"]:
            u = average(u, g, group["momentum"])
    options = {name: group[name] for name in ("norm", "method", "steps", "coefficients", "eps")}
    return of_whole(lambda whole: dual_direction(whole, **options), u)
