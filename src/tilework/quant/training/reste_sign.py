"""Signs with the gradient of a root, and layers of them."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilework import _checks
from tilework.catalog import implements
from tilework.quant._arguments import computed
from tilework.quant.training.straight_through import straight_through
from tilework.quant.training.svid_decompose import sign

__all__ = ["ReSTEConv2d", "ReSTELinear", "reste_exponent", "reste_sign"]

_PAPER = implements(
    "Estimator Meets Equilibrium Perspective: A Rectified Straight Through Estimator for Binary "
    "Neural Networks Training",
    year=2023,
    arxiv="2308.06689",
)
_Size = int | tuple[int, int]


def _check_options(name: str, exponent: Any, threshold: Any, interval: Any) -> None:
    _checks.at_least(name, "exponent", exponent, 1)
    _checks.positive(name, "threshold", threshold)
    if not 0 < _checks.number(name, "interval", interval) <= threshold:
        accepted = f"a number above 0 and at most threshold={threshold!r}"
        raise _checks.bad_value(name, "interval", accepted, interval)


@_PAPER
def reste_sign(
    input: Tensor, *, exponent: float = 1.0, threshold: float = 1.5, interval: float = 0.1
) -> Tensor:
    r"""The sign, 1 for 0, with the gradient of a root, which nears the sign as it is trained.

    With ``exponent`` :math:`o`, ``threshold`` :math:`t` and ``interval`` :math:`m`:

    .. math::

        y = \begin{cases} 1 & x \ge 0 \\ -1 & x < 0 \end{cases}, \qquad
        \frac{\partial y}{\partial x} := \begin{cases}
            m^{1/o - 1} & \lvert x \rvert \le m \\
            \frac 1 o \lvert x \rvert^{1/o - 1} & m < \lvert x \rvert \le t \\
            0 & \lvert x \rvert > t
        \end{cases}

    the slope of :math:`\mathrm{sign}(x) \lvert x \rvert^{1/o}`, and of its secant near 0. Second
    derivatives are those of this function too; computed in float32 at least.

    Args:
        input: Values :math:`x`, of any shape.
        exponent: At least 1, where it is the usual clipped gradient; :func:`reste_exponent` raises
            it.
        threshold: Above 0.
        interval: Above 0, and at most ``threshold``.

    Returns:
        Ones of both signs, and nan where ``input`` is nan, of its shape and dtype.

    Raises:
        ValueError: An option is not one of those above.
        TypeError: ``input`` is not of a real floating dtype, or an option no number.

    Example:
        >>> import torch
        >>> from tilework.quant import reste_sign
        >>> x = torch.tensor([-2.0, -1.0, 0.0, 0.25], requires_grad=True)
        >>> y = reste_sign(x, exponent=2.0, interval=0.04)
        >>> y
        tensor([-1., -1.,  1.,  1.], grad_fn=<SubBackward0>)
        >>> y.sum().backward()
        >>> x.grad
        tensor([0.0000, 0.5000, 5.0000, 1.0000])

    Deviations:
        The sign of 0 is 1; the released code has 0 for it. That of nan is nan, so that it shows.

    Reference:
        Xiao-Ming Wu, Dian Zheng, Zuhao Liu, Wei-Shi Zheng. Estimator Meets Equilibrium Perspective:
        A Rectified Straight Through Estimator for Binary Neural Networks Training. 2023.
        arXiv:2308.06689.
    """
    name = "reste_sign"
    _checks.floating(name, "input", input)
    _check_options(name, exponent, threshold, interval)
    exponent, threshold, interval = map(float, (exponent, threshold, interval))
    moving = input.to(computed(input))
    size = moving.abs()
    near = size <= interval
    # Where the secant is taken, the root is of a constant, as its slope at 0 is infinite.
    root = size.masked_fill(near, interval).clamp(max=threshold) ** (1 / exponent)
    secant = interval ** (1 / exponent - 1) * moving
    smooth = secant.where(near, moving.sign() * root)
    return straight_through(smooth, sign(input.detach()).to(smooth.dtype)).to(input.dtype)


@_PAPER
def reste_exponent(epoch: int | float, epochs: int | float, *, end: float = 3.0) -> float:
    r"""The exponent of :func:`reste_sign` at a time of the training.

    .. math::

        o = 1 + \left(1 - \cos\left( \frac \pi 2 \frac{\texttt{epoch}}{\texttt{epochs}} \right)
        \right) (\texttt{end} - 1)

    Args:
        epoch: Epochs that have passed, from 0 to ``epochs``.
        epochs: Epochs of the training, above 0.
        end: The exponent at the end, at least 1.

    Returns:
        The exponent, from 1 to ``end``.

    Raises:
        ValueError: A number is not in the range above.
        TypeError: An argument is not a number.

    Example:
        >>> from tilework.quant import reste_exponent
        >>> [round(reste_exponent(epoch, 4), 3) for epoch in range(5)]
        [1.0, 1.152, 1.586, 2.235, 3.0]

    Reference:
        As :func:`reste_sign`.
    """
    name = "reste_exponent"
    _checks.positive(name, "epochs", epochs)
    if not 0 <= _checks.number(name, "epoch", epoch) <= epochs:
        raise _checks.bad_value(name, "epoch", f"a number from 0 to epochs={epochs!r}", epoch)
    _checks.at_least(name, "end", end, 1)
    return 1 + (1 - math.cos(math.pi / 2 * float(epoch / epochs))) * (float(end) - 1)


class _Binary(nn.Module):
    """What the layers share: their options, and what they multiply."""

    weight: Tensor
    exponent: float
    """Of :func:`reste_sign`, 1 at first; the training loop sets it."""

    def _set_options(self, binarize_input: bool, threshold: float, interval: float) -> None:
        self.exponent = 1.0
        self.binarize_input = bool(binarize_input)
        self.threshold: float = _checks.plain(threshold)
        self.interval: float = _checks.plain(interval)

    def _sign(self, tensor: Tensor) -> Tensor:
        return reste_sign(
            tensor,
            exponent=self.exponent,
            threshold=self.threshold,
            interval=self.interval,
        )

    def _operands(self, input: Tensor) -> tuple[Tensor, Tensor]:
        weight = self._sign(self.weight) * self.weight.abs().mean()
        return self._sign(input) if self.binarize_input else input, weight

    def extra_repr(self) -> str:
        """Return what the layer of torch shows, and the layer's own options."""
        own = (
            f"binarize_input={self.binarize_input}, threshold={self.threshold}, "
            f"interval={self.interval}"
        )
        return f"{super().extra_repr()}, {own}"


@_PAPER
class ReSTELinear(_Binary, nn.Linear):
    r"""Linear layer with binary weights and inputs, in place of ``nn.Linear``.

    With :math:`\mathrm{sign}` = :func:`reste_sign` and :math:`W` = ``weight``, of shape
    :math:`O \times I`, the layer is the linear map of :math:`\mathrm{sign}(x)` by

    .. math::

        \hat W = \mathrm{sign}(W) \, \frac{1}{O I} \sum_{o j} \lvert W_{o j} \rvert

    with the gradients of both factors. The training loop sets the attribute ``exponent``, which is
    1 at first and not in the ``state_dict``, by :func:`reste_exponent`.

    Args:
        in_features: Features of the input.
        out_features: Features of the output.
        bias: Whether there is a bias.
        device: Device of the parameters.
        dtype: Their dtype.
        binarize_input: Whether the input is replaced by its signs; otherwise the weight alone is
            binary.
        threshold: As of :func:`reste_sign`.
        interval: As of :func:`reste_sign`.

    Raises:
        ValueError: An option is not one of those above.
        TypeError: An option is of another type.

    Example:
        >>> import torch
        >>> from tilework.quant import ReSTELinear, reste_exponent
        >>> layer = ReSTELinear(16, 8)
        >>> for epoch in range(2):
        ...     layer.exponent = reste_exponent(epoch, 2)
        ...     layer(torch.randn(4, 16)).sum().backward()

    Reference:
        As :func:`reste_sign`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        binarize_input: bool = True,
        threshold: float = 1.5,
        interval: float = 0.1,
    ) -> None:
        _check_options(type(self).__name__, 1.0, threshold, interval)
        plain = _checks.plain
        super().__init__(plain(in_features), plain(out_features), bias, device, dtype)
        self._set_options(binarize_input, threshold, interval)

    def forward(self, input: Tensor) -> Tensor:
        """Return the linear map of the signs.

        Args:
            input: Shape ``(..., in_features)``.

        Returns:
            Shape ``(..., out_features)``.
        """
        return F.linear(*self._operands(input), self.bias)


@_PAPER
class ReSTEConv2d(_Binary, nn.Conv2d):
    r"""Convolution with binary weights and inputs, in place of ``nn.Conv2d``.

    As :class:`ReSTELinear`; the input is padded after it has become signs, and the mean of the
    magnitudes is over all filters.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of a filter.
        stride: As ``nn.Conv2d``, like what follows.
        padding: ``"same"``, ``"valid"``, or a size.
        dilation: Distance between elements of the kernel.
        groups: Groups of channels that do not see each other.
        bias: Whether there is a parameter ``bias``.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: Device of the parameters.
        dtype: Their dtype.
        binarize_input: Whether the input is replaced by its signs; otherwise the weight alone is
            binary.
        threshold: As of :func:`reste_sign`.
        interval: As of :func:`reste_sign`.

    Raises:
        ValueError: An option is not one of those above.
        TypeError: An option is of another type.

    Example:
        >>> import torch
        >>> from tilework.quant import ReSTEConv2d
        >>> layer = ReSTEConv2d(3, 8, 3, padding=1)
        >>> layer(torch.randn(2, 3, 6, 6)).shape
        torch.Size([2, 8, 6, 6])

    Reference:
        As :func:`reste_sign`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: _Size | str = 0,
        dilation: _Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        binarize_input: bool = True,
        threshold: float = 1.5,
        interval: float = 0.1,
    ) -> None:
        _check_options(type(self).__name__, 1.0, threshold, interval)
        plain = _checks.plain
        super().__init__(
            plain(in_channels),
            plain(out_channels),
            plain(kernel_size),
            plain(stride),
            plain(padding),
            plain(dilation),
            plain(groups),
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._set_options(binarize_input, threshold, interval)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the signs.

        Args:
            input: Shape ``(N, in_channels, H, W)`` or ``(in_channels, H, W)``.

        Returns:
            As ``nn.Conv2d``.
        """
        output: Tensor = self._conv_forward(*self._operands(input), self.bias)
        return output
