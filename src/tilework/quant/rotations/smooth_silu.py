"""MambaQuant: SiLU of inputs whose scale is folded into the layer before."""

import torch
from torch import Tensor

from tilework import _checks
from tilework._options import OptionsModule, buffer
from tilework.quant._arguments import check_broadcastable, computed
from tilework.quant.rotations.klt_rotation import PAPER

__all__ = ["SmoothSiLU", "smooth_silu"]


@PAPER
def smooth_silu(input: Tensor, scale: Tensor | float) -> Tensor:
    r"""SiLU of inputs that have been divided by a factor, divided by that factor.

    .. math::

        y = x \, \sigma(s x)

    with ``scale`` :math:`s`: it is :math:`\mathrm{SiLU}(s x) / s`, so that the rows of the layer
    before may be divided by :math:`s`.

    Args:
        input: Values :math:`x`, of any shape.
        scale: A number, or a tensor that broadcasts against ``input``.

    Returns:
        Values of the shape and dtype of ``input``, computed in float32 at least.

    Raises:
        ValueError: ``scale`` does not broadcast to the shape of ``input``, or is a number that is
            not finite.
        TypeError: A tensor is not of a real floating dtype, or ``scale`` no number.

    Example:
        >>> import torch
        >>> from tilework.quant import smooth_silu
        >>> x = torch.tensor([-1.0, 0.0, 2.0])
        >>> torch.allclose(smooth_silu(x, 1.0), torch.nn.functional.silu(x))
        True

    Reference:
        As :func:`klt_rotation`.
    """
    name = "smooth_silu"
    _checks.floating(name, "input", input)
    if not isinstance(scale, Tensor):
        _checks.finite(name, "scale", scale)
        values = input.to(computed(input))
        return (values * torch.sigmoid(_checks.plain(scale) * values)).to(input.dtype)
    check_broadcastable(name, "scale", scale, input.shape)
    dtype = computed(input, scale)
    values = input.to(dtype)
    return (values * torch.sigmoid(scale.to(dtype) * values)).to(input.dtype)


@PAPER
class SmoothSiLU(OptionsModule):
    r"""The module of :func:`smooth_silu`.

    .. math::

        y = x \, \sigma(s x)

    Args:
        scale: As of :func:`smooth_silu`; it is a buffer.

    Raises:
        ValueError: ``scale`` is a number that is not finite.
        TypeError: ``scale`` is neither a number nor a tensor of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.quant import SmoothSiLU
        >>> SmoothSiLU(torch.tensor([1.0, 2.0]))(torch.zeros(3, 2)).shape
        torch.Size([3, 2])

    Reference:
        As :func:`klt_rotation`.
    """

    scale: Tensor | float = buffer(kw_only=False)

    def __post_init__(self) -> None:
        if not isinstance(self.scale, Tensor):
            _checks.finite(type(self).__name__, "scale", self.scale)
            self.scale = torch.tensor(float(self.scale))
        _checks.floating(type(self).__name__, "scale", self.scale)
        super().__post_init__()

    def forward(self, input: Tensor) -> Tensor:
        """Return the values.

        Args:
            input: Values of any shape.

        Returns:
            Values of the same shape and dtype.
        """
        return smooth_silu(input, self.scale)
