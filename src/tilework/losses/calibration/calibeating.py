"""Calibeating: predict the mean outcome of similar predictions."""

import torch
from torch import Tensor

from tilework import _checks
from tilework._options import StatefulModule, state
from tilework.catalog import implements

__all__ = ["Calibeating"]

_NAME = "Calibeating"


@implements("Online Platt Scaling with Calibeating", year=2023, arxiv="2305.00070")
class Calibeating(StatefulModule):
    r"""Replace a probability by the mean of past outcomes in its bin.

    With :math:`B` = ``num_bins`` bins of equal width:

    .. math::

        b(p) = \min(\lfloor B p \rfloor,\ B - 1), \qquad
        \hat p_t = \frac{\sum_{s < t,\ b(p_s) = b(p_t)} y_s}{|\{s < t : b(p_s) = b(p_t)\}|}

    and :math:`\hat p_t = p_t` while the bin is empty. Given the predictions of
    :class:`OnlinePlattScaling`, it is the paper's combination. The buffers ``counts`` and
    ``positives`` hold the outcomes of each bin.

    Args:
        num_bins: The number of bins.

    Raises:
        ValueError: The number of bins is below 1, a probability is not from 0 to 1, or a target is
            neither 0 nor 1.
        TypeError: The number of bins is no int, or a probability is no number.

    Example:
        >>> from tilework.losses import Calibeating
        >>> calibeating = Calibeating()
        >>> for outcome in (1, 0, 0, 0):
        ...     calibeating.update(0.62, outcome)
        >>> calibeating.predict(0.65), calibeating.predict(0.3)
        (0.25, 0.3)

    Reference:
        As :class:`OnlinePlattScaling`.
    """

    num_bins: int = 10
    counts: Tensor = state(lambda self: torch.zeros(self.num_bins, dtype=torch.int64))
    positives: Tensor = state(lambda self: torch.zeros(self.num_bins, dtype=torch.int64))

    def _check(self) -> None:
        _checks.count(_NAME, "num_bins", self.num_bins)

    def predict(self, probability: float) -> float:
        """Return the mean outcome of the probability's bin, or itself while that is empty."""
        bin = self._bin("predict", probability)
        count = int(self.counts[bin])
        return int(self.positives[bin]) / count if count else float(probability)

    def update(self, probability: float, target: int) -> None:
        """Learn from the outcome, 0 or 1, of an event that had this probability."""
        bin = self._bin("update", probability)
        if target not in (0, 1):
            raise _checks.bad_value(f"{_NAME}.update", "target", "0 or 1", target)
        self.counts[bin] += 1
        self.positives[bin] += int(target)

    def _bin(self, method: str, probability: float) -> int:
        _checks.fraction(f"{_NAME}.{method}", "probability", probability)
        return min(int(probability * self.num_bins), self.num_bins - 1)
