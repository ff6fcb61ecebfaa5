"""Linear warm-up, then polynomial decay."""

from tilework import _checks
from tilework.catalog import implements

__all__ = ["warmup_polynomial"]

_NAME = "warmup_polynomial"


@implements(
    "A Large Batch Optimizer Reality Check: Traditional, Generic Optimizers Suffice Across Batch "
    "Sizes",
    year=2021,
    arxiv="2102.06356",
)
def warmup_polynomial(
    step: int | float,
    *,
    warmup_steps: int | float,
    total_steps: int | float,
    power: int | float = 1.0,
    final_factor: int | float = 0.0,
) -> float:
    r"""The factor of the learning rate at a step of linear warm-up and polynomial decay.

    With ``step`` :math:`s`, ``warmup_steps`` :math:`w`, ``total_steps`` :math:`T`, ``power``
    :math:`k` and ``final_factor`` :math:`f`:

    .. math::

        \begin{cases}
            (s + 1) / w & s < w \\
            f + (1 - f) \big( 1 - \min(1, \tfrac{s - w}{T - w}) \big)^k & s \ge w
        \end{cases}

    Steps count from 0: the first one has :math:`1 / w` already, and both :math:`w - 1` and
    :math:`w` have 1.

    Args:
        step: The step, at least 0.
        warmup_steps: The number of steps of the warm-up, at least 0.
        total_steps: The step from which on the factor is ``final_factor``, above ``warmup_steps``.
        power: The degree of the polynomial, above 0.
        final_factor: What the factor falls to.

    Returns:
        A number that ``torch.optim.lr_scheduler.LambdaLR`` multiplies the learning rate by.

    Raises:
        ValueError: A number is out of its range, infinite or nan.
        TypeError: An argument is not a number.

    Example:
        >>> from tilework.optim import warmup_polynomial
        >>> [warmup_polynomial(s, warmup_steps=2, total_steps=6, power=2) for s in range(7)]
        [0.5, 1.0, 1.0, 0.5625, 0.25, 0.0625, 0.0]

    Reference:
        Zachary Nado, Justin M. Gilmer, Christopher J. Shallue, Rohan Anil, George E. Dahl. A Large
        Batch Optimizer Reality Check: Traditional, Generic Optimizers Suffice Across Batch Sizes.
        2021. arXiv:2102.06356.
    """
    _checks.at_least(_NAME, "step", step, 0)
    _checks.at_least(_NAME, "warmup_steps", warmup_steps, 0)
    _checks.finite(_NAME, "total_steps", total_steps)
    if total_steps <= warmup_steps:
        accepted = f"above warmup_steps, {warmup_steps}"
        raise _checks.bad_value(_NAME, "total_steps", accepted, total_steps)
    _checks.positive(_NAME, "power", power)
    _checks.finite(_NAME, "final_factor", final_factor)
    if step < warmup_steps:
        return float((step + 1) / warmup_steps)
    part = (1 - min(1, (step - warmup_steps) / (total_steps - warmup_steps))) ** power
    return float((1 - part) * final_factor + part)
