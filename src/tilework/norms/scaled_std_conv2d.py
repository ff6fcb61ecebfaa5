"""A convolution whose filters are standardized and scaled."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements

__all__ = ["ScaledStdConv2d"]

_NAME = "ScaledStdConv2d"
_Size = int | tuple[int, int]


@implements(
    "High-Performance Large-Scale Image Recognition Without Normalization",
    year=2021,
    arxiv="2102.06171",
)
class ScaledStdConv2d(nn.Conv2d):
    r"""Convolution with standardized filters, in place of ``nn.Conv2d`` and a normalization.

    With a filter :math:`W` of ``weight``, the mean :math:`\mu` and the biased variance
    :math:`\sigma^2` of its :math:`N` = ``in_channels / groups * kernel_size**2`` elements,
    :math:`g` = ``gain``, :math:`\gamma` = ``gamma`` and :math:`\epsilon` = ``eps``, the layer
    convolves with

    .. math::

        \hat W = \frac{g \, \gamma}{\sqrt N} \, \frac{W - \mu}{\sqrt{\sigma^2 + \epsilon}}

    so that :math:`\hat W` has mean 0 and a sum of squares of :math:`g^2 \gamma^2`, but for
    :math:`\epsilon`. Standardized in float32 (float64 for float64) and rounded once to the dtype of
    ``weight``. Besides ``weight`` and ``bias`` there is a parameter ``gain`` of shape
    ``(out_channels, 1, 1, 1)``.

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
        gamma: The gain of the activation before the layer, above 0, which makes up for the
            variance that it takes: :math:`\sqrt{2 / (1 - 1/\pi)}` for ReLU.
        eps: Added to the variance, above 0.
        gain_init: What ``gain`` starts at.

    Raises:
        ValueError: An option is not one of those above.
        TypeError: An option is of another type.

    Example:
        >>> import torch
        >>> from tilework.norms import ScaledStdConv2d
        >>> conv = ScaledStdConv2d(3, 8, 3, padding=1, gamma=1.7139588594436646)
        >>> conv(torch.randn(2, 3, 6, 6)).shape
        torch.Size([2, 8, 6, 6])

    Deviations:
        The paper takes the larger of the fan-in times the variance and 1e-4; here epsilon is added
        to the variance, as in the common code for PyTorch.

    Reference:
        Andrew Brock, Soham De, Samuel L. Smith, Karen Simonyan. High-Performance Large-Scale Image
        Recognition Without Normalization. 2021. arXiv:2102.06171.
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
        gamma: float = 1.0,
        eps: float = 1e-6,
        gain_init: float = 1.0,
    ) -> None:
        _checks.positive(_NAME, "gamma", gamma)
        _checks.positive(_NAME, "eps", eps)
        _checks.finite(_NAME, "gain_init", gain_init)
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
        self.gamma: float = plain(gamma)
        self.eps: float = plain(eps)
        self.gain_init: float = plain(gain_init)
        self.gain = nn.Parameter(
            torch.full((out_channels, 1, 1, 1), gain_init, device=device, dtype=dtype)
        )

    def reset_parameters(self) -> None:
        """Draw the weight and the bias as ``nn.Conv2d`` does, and set the gain to its start."""
        super().reset_parameters()
        if hasattr(self, "gain"):  # not yet when nn.Conv2d itself is made
            nn.init.constant_(self.gain, self.gain_init)

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution with the standardized filters."""
        output: Tensor = self._conv_forward(input, self._standardized(), self.bias)
        return output

    def _standardized(self) -> Tensor:
        weight = self.weight.to(computation_dtype(self.weight.dtype))
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        fan_in = weight.shape[1:].numel()
        gain = self.gamma * self.gain.to(weight.dtype)
        scale = gain / (fan_in * (variance + self.eps)).sqrt()
        standardized: Tensor = ((weight - mean) * scale).to(self.weight.dtype)
        return standardized

    def extra_repr(self) -> str:
        """Return what ``nn.Conv2d`` shows, and the layer's own options."""
        own = f"gamma={self.gamma}, eps={self.eps}, gain_init={self.gain_init}"
        return f"{super().extra_repr()}, {own}"  # type: ignore[no-untyped-call]
