"""Rotated values on the grid that is best for normal ones, with gradients where it is near."""

from dataclasses import field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilework import _checks
from tilework._options import OptionsModule
from tilework.catalog import implements
from tilework.quant._arguments import computed
from tilework.quant.rotations.hadamard import check_power_of_two, hadamard_transform
from tilework.quant.training.straight_through import straight_through

__all__ = ["QuestLinear", "QuestQuantizer", "quest_quantize"]

_PAPER = implements(
    "QuEST: Stable Training of LLMs with 1-Bit Weights and Activations",
    year=2025,
    arxiv="2502.05003",
)
_CLIPS = {
    1: 0.7978845587140913,
    1.585: 1.2240089519030855,
    2: 1.4935346200015913,
    3: 2.051068354131873,
    4: 2.513930578568423,
    5: 2.9160938834961225,
    6: 3.276597282593217,
    7: 3.6010497188221655,
    8: 3.884938678807525,
}
"""By bits, where normal values of variance 1 are clipped for the least mean square error."""
_LEAST_CLIP = 1e-8


def _check_options(name: str, bits: Any, block_size: Any, argument: str = "bits") -> None:
    if bits is not None and _checks.number(name, argument, bits) not in _CLIPS:
        accepted = "one of " + ", ".join(map(str, _CLIPS))
        raise _checks.bad_value(name, argument, accepted, bits)
    if block_size is not None:
        check_power_of_two(name, "block_size", block_size)


def _check_quantizer(name: str, bits: Any, block_size: Any, trust: Any) -> None:
    _checks.number(name, "bits", bits)
    _check_options(name, bits, block_size)
    if trust is not None:
        _checks.positive(name, "trust", trust)


def _rotated(name: str, input: Tensor, block_size: int | None) -> Tensor:
    """Blocks times the matrix of Hadamard, or what came where there is no size of a block."""
    _checks.floating(name, "input", input)
    if not input.dim():
        raise _checks.bad_value(name, "input", "of at least one dimension", input)
    if block_size is None:
        return input
    if input.shape[-1] % block_size:
        accepted = f"of a multiple of block_size={block_size} in its last size"
        raise _checks.bad_value(name, "input", accepted, input)
    return hadamard_transform(input, block_size=block_size)


@_PAPER
def quest_quantize(
    input: Tensor,
    *,
    bits: int | float = 4,
    block_size: int | None = 128,
    rotate_back: bool = True,
    trust: float | None = None,
) -> Tensor:
    r"""Rotated values on a grid that fits each row, with a gradient where the grid is near.

    With the transform :math:`\mathcal H` of :func:`hadamard_transform` in blocks of ``block_size``,
    :math:`L` levels for ``bits`` :math:`b`, and the clip :math:`a_b` that has the least mean square
    error for normal values, for each row:

    .. math::

        h = \mathcal H x, \qquad \sigma = \sqrt{\mathrm{mean}(h^2)}, \qquad
        c = a_b \sigma + 10^{-8}, \qquad \delta = \frac{2 c}{L - 1}, \qquad
        v = \min(\max(h, -c), c) / \delta

    .. math::

        q = \begin{cases}
            \left( \mathrm{round}(v + \frac 1 2) - \frac 1 2 \right) \delta & L \text{ even} \\
            \mathrm{round}(v) \, \delta & L = 3
        \end{cases}
        \qquad y = \mathcal H q

    or :math:`y = q` without ``rotate_back``. Of the gradient :math:`g` of :math:`y` the input has,
    with ``trust`` :math:`T`,

    .. math::

        \mathcal H (M \odot \mathcal H g), \qquad M = [\lvert q - h \rvert \le T \sigma]

    or :math:`\mathcal H (M \odot g)`; the statistics have none. By default the distance is half a
    step, so that :math:`M = [\lvert h \rvert \le c + \delta / 2]`.

    Args:
        input: Values :math:`x`, of shape (..., n).
        bits: 1, 1.585, which is three levels, or 2 to 8.
        block_size: A power of two that divides n; None is no rotation at all.
        rotate_back: Whether the result is rotated as the input was.
        trust: The distance in units of :math:`\sigma` to which there is a gradient, above 0; None
            is half a step.

    Returns:
        Values of the shape and dtype of ``input``, computed in float32 at least.

    Raises:
        ValueError: ``input`` has no dimension or a last one that is no multiple of ``block_size``,
            or an option is not one of those above.
        TypeError: ``input`` is not of a real floating dtype, or an option of another type.

    Example:
        >>> import torch
        >>> from tilework.quant import quest_quantize
        >>> x = torch.tensor([-1.0, 0.1, 0.4, 3.0], requires_grad=True)
        >>> y = quest_quantize(x, bits=1, block_size=None)
        >>> y
        tensor([-1.2722,  1.2722,  1.2722,  1.2722], grad_fn=<SubBackward0>)
        >>> y.sum().backward()
        >>> x.grad
        tensor([1., 1., 1., 0.])

    Deviations:
        The released code has :math:`2^{1.585} = 3.0001` levels in the formula of an even number,
        which gives :math:`-\delta / 2`, :math:`\delta / 2` and :math:`3 \delta / 2`. Here three
        levels are :math:`-c`, 0 and :math:`c`, which the clip is best for.

    Reference:
        Andrei Panferov, Jiale Chen, Soroush Tabesh, Roberto L. Castro, Mahdi Nikdan, Dan Alistarh.
        QuEST: Stable Training of LLMs with 1-Bit Weights and Activations. 2025. arXiv:2502.05003.
    """
    name = "quest_quantize"
    _check_quantizer(name, bits, block_size, trust)
    _checks.floating(name, "input", input)
    rotated = _rotated(name, input.to(computed(input)), block_size)
    values = rotated.detach()
    levels = 3 if bits == 1.585 else 2 ** int(bits)
    best = _CLIPS[_checks.plain(bits)]
    deviation = values.square().mean(-1, keepdim=True).sqrt()
    clip = best * deviation + _LEAST_CLIP
    step = 2 * clip / (levels - 1)
    shift = 0.0 if levels == 3 else 0.5
    quantized = ((values.clamp(-clip, clip) / step + shift).round() - shift) * step
    if trust is None:  # so that rounding does not decide in the middle between two levels
        near = values.abs() <= clip + step / 2
    else:
        near = (quantized - values).abs() <= float(trust) * deviation
    result = straight_through(rotated, quantized, near)
    if rotate_back:
        result = _rotated(name, result, block_size)
    return result.to(input.dtype)


@_PAPER
class QuestQuantizer(OptionsModule):
    r"""The module of :func:`quest_quantize`, alike in training and evaluation.

    .. math::

        y = \texttt{quest\_quantize}(x)

    Args:
        bits: As of :func:`quest_quantize`.
        block_size: As of :func:`quest_quantize`.
        rotate_back: As of :func:`quest_quantize`.
        trust: As of :func:`quest_quantize`.

    Raises:
        ValueError: An option is not one of those that :func:`quest_quantize` takes.
        TypeError: An option is of another type.

    Example:
        >>> import torch
        >>> from tilework.quant import QuestQuantizer
        >>> QuestQuantizer(2, block_size=4)(torch.ones(2, 8)).shape
        torch.Size([2, 8])

    Reference:
        As :func:`quest_quantize`.
    """

    bits: int | float = field(default=4, kw_only=False)
    block_size: int | None = 128
    rotate_back: bool = True
    trust: float | None = None

    def _check(self) -> None:
        _check_quantizer(type(self).__name__, self.bits, self.block_size, self.trust)

    def forward(self, input: Tensor) -> Tensor:
        """Return the values on the grid.

        Args:
            input: Shape ``(..., n)``.

        Returns:
            Values of the same shape and dtype.
        """
        return quest_quantize(input, bits=self.bits, **self.options())


@_PAPER
class QuestLinear(nn.Linear):
    r"""Linear layer whose input and weight are rotated and quantized, in place of ``nn.Linear``.

    With :math:`q` = :func:`quest_quantize` over ``in_features``, which does not rotate back:

    .. math::

        y = q(x) \, q(W)^\top + \texttt{bias}

    The rotation of one is undone by that of the other.

    Args:
        in_features: Features of the input, a multiple of ``block_size``.
        out_features: Features of the output.
        bias: Whether there is a bias.
        device: Device of the parameters.
        dtype: Their dtype.
        weight_bits: Bits of the weight, each row with a grid; None rotates it alone.
        activation_bits: Bits of the input, each token with a grid; None rotates it alone.
        block_size: A power of two; None is no rotation.

    Raises:
        ValueError: An option is not one of those above.
        TypeError: An option is of another type.

    Example:
        >>> import torch
        >>> from tilework.quant import QuestLinear
        >>> layer = QuestLinear(16, 8, weight_bits=2, activation_bits=None, block_size=16)
        >>> layer(torch.randn(4, 16)).shape
        torch.Size([4, 8])

    Reference:
        As :func:`quest_quantize`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        weight_bits: int | float | None = 4,
        activation_bits: int | float | None = 4,
        block_size: int | None = 128,
    ) -> None:
        name, plain = type(self).__name__, _checks.plain
        _check_options(name, weight_bits, block_size, "weight_bits")
        _check_options(name, activation_bits, None, "activation_bits")
        if block_size is not None and in_features % block_size:
            accepted = f"a multiple of block_size={block_size}"
            raise _checks.bad_value(name, "in_features", accepted, in_features)
        super().__init__(plain(in_features), plain(out_features), bias, device, dtype)
        self.weight_bits: int | float | None = plain(weight_bits)
        self.activation_bits: int | float | None = plain(activation_bits)
        self.block_size: int | None = plain(block_size)

    def _operand(self, tensor: Tensor, bits: int | float | None) -> Tensor:
        if bits is None:
            return _rotated(type(self).__name__, tensor, self.block_size)
        return quest_quantize(tensor, bits=bits, block_size=self.block_size, rotate_back=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return the linear map of the values on grids.

        Args:
            input: Shape ``(..., in_features)``.

        Returns:
            Shape ``(..., out_features)``.
        """
        weight = self._operand(self.weight, self.weight_bits)
        return F.linear(self._operand(input, self.activation_bits), weight, self.bias)

    def extra_repr(self) -> str:
        """Return what the layer of torch shows, and the layer's own options."""
        own = (
            f"weight_bits={self.weight_bits}, activation_bits={self.activation_bits}, "
            f"block_size={self.block_size}"
        )
        return f"{super().extra_repr()}, {own}"
