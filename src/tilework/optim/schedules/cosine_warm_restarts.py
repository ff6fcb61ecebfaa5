"""Cosine annealing that starts anew after each period."""

import math

from tilework import _checks
from tilework.catalog import implements

__all__ = ["cosine_warm_restarts"]

_NAME = "cosine_warm_restarts"


@implements("Decoupled Weight Decay Regularization", year=2017, arxiv="1711.05101")
def cosine_warm_restarts(
    step: int | float,
    *,
    period: int | float,
    multiplier: int | float = 1.0,
    min_factor: int | float = 0.0,
    max_factor: int | float = 1.0,
) -> float:
    r"""The factor of the learning rate at a step of cosine annealing with warm restarts.

    Period :math:`i` has the length :math:`T_i`, where :math:`T_0` = ``period`` and
    :math:`T_{i+1} = \mathrm{multiplier} \cdot T_i`. In the period of ``step`` :math:`s`, which
    began at :math:`\sum_{j<i} T_j \le s`:

    .. math::

        c = s - \sum_{j<i} T_j, \qquad
        \mathrm{min} + \tfrac{1}{2} (\mathrm{max} - \mathrm{min})
        \big( 1 + \cos(\pi c / T_i) \big)

    with ``min_factor`` and ``max_factor``, which it is where a period begins.

    Args:
        step: The step, at least 0; real numbers are allowed, such as fractions of an epoch.
        period: The length of the first period, in steps, above 0.
        multiplier: The length of a period over that of the one before, at least 1.
        min_factor: What the factor falls to.
        max_factor: What it starts from.

    Returns:
        A number that ``torch.optim.lr_scheduler.LambdaLR`` multiplies the learning rate by.

    Raises:
        ValueError: A number is out of its range, infinite or nan.
        TypeError: An argument is not a number.

    Example:
        >>> from tilework.optim import cosine_warm_restarts
        >>> [round(cosine_warm_restarts(step, period=2, multiplier=2), 3) for step in range(7)]
        [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]

    Reference:
        Ilya Loshchilov, Frank Hutter. Decoupled Weight Decay Regularization. 2017.
        arXiv:1711.05101.
    """
    _checks.at_least(_NAME, "step", step, 0)
    _checks.positive(_NAME, "period", period)
    _checks.at_least(_NAME, "multiplier", multiplier, 1)
    _checks.finite(_NAME, "min_factor", min_factor)
    _checks.finite(_NAME, "max_factor", max_factor)
    passed = _checks.number(_NAME, "step", step)
    length = _checks.number(_NAME, "period", period)
    if multiplier == 1:
        passed %= length
    else:
        start: float = 0
        while start + length <= passed:
            start += length
            length *= multiplier
        passed -= start
    fallen = math.sin(math.pi / 2 * passed / length) ** 2  # (1 - cos) / 2
    return float(max_factor - fallen * (max_factor - min_factor))  # from above: exact at restarts
