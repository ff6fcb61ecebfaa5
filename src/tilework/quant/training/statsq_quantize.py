"""Levels about 0, but not at it, with a scale from statistics, so that weights do not oscillate."""

from dataclasses import field
from typing import Any

from torch import Tensor

from tilework import _checks
from tilework._options import OptionsModule
from tilework.catalog import implements
from tilework.quant._arguments import check_bits, computed
from tilework.quant.training.straight_through import straight_through

__all__ = ["StatsQuantizer", "statsq_quantize"]

PAPER = implements(
    "Oscillation-free Quantization for Low-bit Vision Transformers", year=2023, arxiv="2302.02210"
)


def _check_options(name: str, bits: Any, boundary_range: Any) -> None:
    check_bits(name, bits)
    if boundary_range is not None:
        _checks.at_least(name, "boundary_range", boundary_range, 0)


@PAPER
def statsq_quantize(input: Tensor, *, bits: int = 4, boundary_range: float | None = None) -> Tensor:
    r"""The nearest of an even number of levels about 0, scaled by the mean magnitude of a row.

    For each row of ``input`` :math:`W`, with :math:`n = 2^{b - 1}` for ``bits`` :math:`b`:

    .. math::

        s = 2 \, \mathrm{mean}_j \lvert W_j \rvert, \qquad
        \zeta = n \min(\max(W / s, -1), 1) - \tfrac 1 2, \qquad
        k = \min(\max(\mathrm{round}(\zeta), -n), n - 1), \qquad
        y = \frac s n \left( k + \tfrac 1 2 \right)

    A row of zeros stays one. The gradient is that of the identity, also where values are clipped;
    :math:`s` has none. With ``boundary_range`` :math:`\epsilon`, to freeze late in training all but
    the weights that may still change their level, it is multiplied by

    .. math::

        [\exists \, i \in \{-n, \dots, n - 2\} : \lvert \zeta - (i + \tfrac 1 2) \rvert
        \le \epsilon]

    Args:
        input: Weights :math:`W`, of shape (..., in).
        bits: Bits of a code, from 1 to 8.
        boundary_range: How near to the border of two levels there is a gradient, in steps, at
            least 0; None is everywhere. The paper takes 0.005.

    Returns:
        Levels of the shape and dtype of ``input``, computed in float32 at least.

    Raises:
        ValueError: ``input`` has no dimension, or an option is not one of those above.
        TypeError: ``input`` is not of a real floating dtype, or an option of another type.

    Example:
        >>> import torch
        >>> from tilework.quant import statsq_quantize
        >>> statsq_quantize(torch.tensor([[-3.0, 0.0, 0.25, 0.75]]), bits=2)
        tensor([[-1.5000,  0.5000,  0.5000,  0.5000]])

    Deviations:
        The released code clips at :math:`1 - 10^{-6}` and not :math:`k`, so that 1 bit has three
        levels. Its annealing loses the mask to an outer straight-through value, so that nothing is
        frozen; here gradients are masked, as the paper says.

    Reference:
        Shih-Yang Liu, Zechun Liu, Kwang-Ting Cheng. Oscillation-free Quantization for Low-bit
        Vision Transformers. 2023. arXiv:2302.02210.
    """
    name = "statsq_quantize"
    _checks.floating(name, "input", input)
    if not input.dim():
        raise _checks.bad_value(name, "input", "of at least one dimension", input)
    _check_options(name, bits, boundary_range)
    half = 2 ** (int(bits) - 1)
    weight = input.detach().to(computed(input))
    scale = 2 * weight.abs().mean(-1, keepdim=True)
    place = (weight / scale.masked_fill(scale == 0, 1.0)).clamp(-1, 1) * half - 0.5
    levels = place.round().clamp(-half, half - 1)
    values = (scale * (levels + 0.5) / half).to(input.dtype)
    mask = None
    if boundary_range is not None:
        border = place.floor().clamp(-half, half - 2) + 0.5
        mask = (place - border).abs() <= float(boundary_range)
    return straight_through(input, values, mask)


@PAPER
class StatsQuantizer(OptionsModule):
    r"""The module of :func:`statsq_quantize`, which freezes weights in training alone.

    .. math::

        y = \texttt{statsq\_quantize}(W)

    where ``boundary_range`` counts in training mode only; values are the same in both.

    Args:
        bits: As of :func:`statsq_quantize`.
        boundary_range: As of :func:`statsq_quantize`.

    Raises:
        ValueError: An option is not one of those that :func:`statsq_quantize` takes.
        TypeError: An option is of another type.

    Example:
        >>> import torch
        >>> from tilework.quant import StatsQuantizer
        >>> layer = torch.nn.Linear(4, 3)
        >>> torch.nn.utils.parametrize.register_parametrization(
        ...     layer, "weight", StatsQuantizer(2)
        ... ).weight.unique().numel() <= 3 * 4
        True

    Reference:
        As :func:`statsq_quantize`.
    """

    bits: int = field(default=4, kw_only=False)
    boundary_range: float | None = None

    def _check(self) -> None:
        _check_options(type(self).__name__, self.bits, self.boundary_range)

    def forward(self, input: Tensor) -> Tensor:
        """Return the levels.

        Args:
            input: Shape ``(..., in)``.

        Returns:
            Levels of the same shape and dtype.
        """
        border = self.boundary_range if self.training else None
        return statsq_quantize(input, bits=self.bits, boundary_range=border)
