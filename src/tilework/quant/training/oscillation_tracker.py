"""How often codes of weights turn back in training."""

import torch
from torch import Tensor

from tilework import _checks
from tilework._options import Options
from tilework.quant._arguments import is_integer
from tilework.quant.training.statsq_quantize import PAPER

__all__ = ["OscillationTracker"]


@PAPER
class OscillationTracker(Options):
    r"""Counts how often each code moves against the way in which it moved before.

    With the codes :math:`k_t` of step :math:`t`, and ``momentum`` :math:`m`:

    .. math::

        d_t = \mathrm{sign}(k_{t - 1} - k_t), \qquad o_t = [d' d_t = -1], \qquad
        e_t = m \, o_t + (1 - m) \, e_{t - 1}

    where :math:`d'` is the last :math:`d` that was not 0. The first codes are stored alone.
    ``ema`` is :math:`e`, float32, and ``total`` the sum of :math:`o`, int64; both are None before
    the first codes.

    Args:
        momentum: The part of what is new in the mean, from 0 to 1.

    Raises:
        ValueError: ``momentum`` is not in its range.
        TypeError: ``momentum`` is not a number.

    Example:
        >>> import torch
        >>> from tilework.quant import OscillationTracker
        >>> tracker = OscillationTracker(momentum=0.5)
        >>> for codes in ([1, 5], [2, 6], [1, 6], [2, 7]):
        ...     oscillated = tracker.update(torch.tensor(codes))
        >>> oscillated, tracker.total, tracker.ema
        (tensor([ True, False]), tensor([2, 0]), tensor([0.7500, 0.0000]))

    Reference:
        As :func:`statsq_quantize`.
    """

    momentum: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reset()

    def _check(self) -> None:
        _checks.fraction(type(self).__name__, "momentum", self.momentum)

    def reset(self) -> None:
        """Forget all codes."""
        self.ema: Tensor | None = None
        self.total: Tensor | None = None
        self._codes: Tensor | None = None
        self._direction: Tensor | None = None

    @torch.no_grad()
    def update(self, codes: Tensor) -> Tensor:
        """Take the codes of a step.

        Args:
            codes: Codes or levels of any shape, the same at each step; integers or floating.

        Returns:
            Which of them turned back, bool of the shape of ``codes``.

        Raises:
            ValueError: ``codes`` is not of the shape of those before.
            TypeError: ``codes`` is not of a real dtype, or of bool.
        """
        name = f"{type(self).__name__}.update"
        if not isinstance(codes, Tensor) or not (codes.is_floating_point() or is_integer(codes)):
            raise _checks.bad_type(name, "codes", "an integer or floating-point tensor", codes)
        before, self._codes = self._codes, codes.detach().clone()
        if before is None or self.ema is None or self.total is None or self._direction is None:
            self.ema = torch.zeros_like(codes, dtype=torch.float32)
            self.total = torch.zeros_like(codes, dtype=torch.int64)
            self._direction = torch.zeros_like(codes, dtype=torch.int8)
            return torch.zeros_like(codes, dtype=torch.bool)
        if codes.shape != before.shape:
            self._codes = before
            raise _checks.bad_value(name, "codes", f"of shape {tuple(before.shape)}", codes)
        # Not by a difference, which a dtype without signs does not have.
        direction = (before > codes).to(torch.int8) - (before < codes).to(torch.int8)
        oscillated = self._direction * direction == -1
        self.ema = self.momentum * oscillated + (1 - self.momentum) * self.ema
        self.total = self.total + oscillated
        self._direction = direction.where(direction != 0, self._direction)
        return oscillated
