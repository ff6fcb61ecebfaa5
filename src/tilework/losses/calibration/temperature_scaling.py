"""The temperature that calibrates logits after training."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework._options import StatefulModule, state
from tilework.catalog import implements
from tilework.losses._classes import class_index

__all__ = ["TemperatureScaling"]

_NAME = "TemperatureScaling"
_TOLERANCE = 1e-10
_ELEMENTS = 2**18


@implements(
    "On the Limitations of Temperature Scaling for Distributions with Overlaps",
    year=2023,
    arxiv="2306.00740",
)
class TemperatureScaling(StatefulModule):
    r"""Divide logits by the temperature that suits held-out rows best.

    ``fit`` finds, with the logits :math:`z_i` of a row and its class :math:`y_i`,

    .. math::

        \operatorname*{argmin}_{t} \frac{1}{N} \sum_{i=1}^{N}
            -\log \mathrm{softmax}(z_i / t)_{y_i},
        \qquad \mathtt{min\_temperature} \le t \le \mathtt{max\_temperature}

    which is convex in :math:`1 / t`: by Newton's method within a shrinking bracket, in float64. The
    same rows give the same temperature. Rows of equal logits say nothing, and give 1. The buffer
    ``temperature`` is a float64 scalar, 1 before ``fit``.

    Args:
        min_temperature: The lowest result, above 0.
        max_temperature: The highest result, above ``min_temperature``.

    Raises:
        ValueError: The bounds are not those above; for ``fit`` a shape is wrong, no row is kept, or
            a kept row has logits that are not finite; -inf is a class that no row has.
        TypeError: ``input`` is not of a floating dtype, or ``target`` is not int64.
        IndexError: A target is neither a class nor ``ignore_index``.

    Example:
        >>> import torch
        >>> from tilework.losses import TemperatureScaling
        >>> input = torch.tensor([[4.0, 0.0]] * 4)  # sure of class 0, which is right 3 times of 4
        >>> scaling = TemperatureScaling().fit(input, torch.tensor([0, 0, 0, 1]))
        >>> scaling(input[0]).softmax(0)
        tensor([0.7500, 0.2500])

    Deviations:
        The paper minimizes by gradient steps; the minimum is the same.

    Reference:
        Muthu Chidambaram, Rong Ge. On the Limitations of Temperature Scaling for Distributions with
        Overlaps. 2023. arXiv:2306.00740.
    """

    min_temperature: float = 0.01
    max_temperature: float = 100.0
    temperature: Tensor = state(lambda self: torch.ones((), dtype=torch.float64))

    def _check(self) -> None:
        _checks.positive(_NAME, "min_temperature", self.min_temperature)
        _checks.positive(_NAME, "max_temperature", self.max_temperature)
        if self.max_temperature <= self.min_temperature:
            accepted = f"above min_temperature={self.min_temperature}"
            raise _checks.bad_value(_NAME, "max_temperature", accepted, self.max_temperature)

    @torch.no_grad()
    def fit(
        self, input: Tensor, target: Tensor, *, ignore_index: int = -100
    ) -> "TemperatureScaling":
        """Set the temperature from logits of shape ``(N, C)`` and classes of shape ``(N)``.

        Waits for the device of the logits.
        """
        name = f"{_NAME}.fit"
        _checks.integer(name, "ignore_index", ignore_index)
        if isinstance(input, Tensor) and input.dim() != 2:
            raise _checks.bad_value(name, "input", "of shape (N, C)", input)
        positions = class_index.positions(name, input, target, ignore_index)
        kept, target = positions.kept, positions.target
        del positions
        if not bool(kept.any()):
            raise ValueError(f"{name}: target must keep at least one row, got none")
        if not bool(kept.all()):
            input, target = input[kept], target[kept]
        for gaps, at_target in _blocks(input, target):
            if not bool((gaps < math.inf).all() & at_target.isfinite().all()):
                raise _checks.bad_value(name, "input", "finite where rows are kept", input)
        inverse = _minimize(input, target, 1 / self.max_temperature, 1 / self.min_temperature)
        self.temperature.fill_(1 / inverse)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input / temperature``, of the dtype of ``input`` and any shape."""
        _checks.floating(_NAME, "input", input)
        dtype = computation_dtype(input.dtype)
        return (input.to(dtype) / self.temperature.to(dtype)).to(input.dtype)


def _blocks(input: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time, in float64: logits less the largest one, and those of the targets."""
    size = max(1, _ELEMENTS // input.shape[1])
    for rows, classes in zip(torch.split(input, size), torch.split(target, size), strict=True):
        logits = rows.double()
        gaps = logits - logits.amax(1, keepdim=True)
        yield gaps, gaps.gather(1, classes.unsqueeze(1)).squeeze(1)


def _minimize(input: Tensor, target: Tensor, low: float, high: float) -> float:
    """The inverse temperature, by the sign and the slope of the objective's derivative."""

    def derivatives(inverse: float) -> tuple[float, float]:
        first = second = 0.0
        for gaps, at_target in _blocks(input, target):
            probabilities = (inverse * gaps).softmax(1)
            present = gaps.masked_fill_(gaps == -math.inf, 0)
            mean = (probabilities * present).sum(1, keepdim=True)
            variance = (probabilities * (present - mean).square()).sum(1)
            first += float((mean.squeeze(1) - at_target).sum())
            second += float(variance.sum())
        return first / len(input), second / len(input)

    inverse = min(max(1.0, low), high)
    if not any(bool(((gaps < 0) & (gaps > -math.inf)).any()) for gaps, _ in _blocks(input, target)):
        return inverse
    if derivatives(low)[0] >= 0:
        return low
    if derivatives(high)[0] <= 0:
        return high
    previous = high - low
    while high / low - 1 > _TOLERANCE:
        first, second = derivatives(inverse)
        if first < 0:
            low = inverse
        else:
            high = inverse
        step = first / second if second else math.inf
        if abs(step) <= _TOLERANCE * inverse:
            return inverse - step
        # Newton's method while its steps halve inside of the bracket, otherwise the middle of it.
        if low < inverse - step < high and 2 * abs(step) < previous:
            inverse, previous = inverse - step, abs(step)
        else:
            inverse, previous = math.sqrt(low * high), high - low
    return inverse
