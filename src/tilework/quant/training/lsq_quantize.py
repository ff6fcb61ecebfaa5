"""Multiples of a step that is learned."""

import math
from typing import Any

import torch
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.quant._arguments import check_broadcastable, computed
from tilework.quant.training.straight_through import straight_through

__all__ = ["lsq_quantize"]


@implements("Learned Step Size Quantization", year=2019, arxiv="1902.08153")
def lsq_quantize(
    input: Tensor,
    scale: Tensor | float,
    *,
    lower: int,
    upper: int,
    gradient_scale: float | None = None,
) -> Tensor:
    r"""The nearest multiples of a step, with gradients of the values and of the step.

    With ``scale`` :math:`s`, ``lower`` :math:`l`, ``upper`` :math:`p` and ``gradient_scale``
    :math:`\gamma`:

    .. math::

        u = x / s, \qquad q = \min(\max(\mathrm{round}(u), l), p), \qquad y = s q

    .. math::

        \frac{\partial y}{\partial x} := [l \le u \le p], \qquad
        \frac{\partial y}{\partial s} := \gamma \left( q - u \, [l \le u \le p] \right)

    Second derivatives are 0.

    Args:
        input: Values :math:`x`, of any shape.
        scale: A number above 0, or a tensor of such that broadcasts against ``input``.
        lower: The least multiple, below ``upper``.
        upper: The largest multiple.
        gradient_scale: Factor of the gradient of ``scale``; by default
            :math:`1 / \sqrt{N p}` with the number :math:`N` of values for each scale.

    Returns:
        Values of the shape and dtype of ``input``, computed in float32 at least.

    Raises:
        ValueError: ``scale`` does not broadcast to the shape of ``input`` or is a number that is
            not above 0, ``lower`` is not below ``upper``, ``gradient_scale`` is not finite, or None
            where ``upper`` is not above 0.
        TypeError: A tensor is not of a real floating dtype, or an option of another type.

    Example:
        >>> import torch
        >>> from tilework.quant import lsq_quantize
        >>> x = torch.tensor([0.3, 1.2, 9.0])
        >>> scale = torch.tensor(0.5, requires_grad=True)
        >>> y = lsq_quantize(x, scale, lower=-4, upper=3, gradient_scale=1.0)
        >>> y
        tensor([0.5000, 1.0000, 1.5000], grad_fn=<SubBackward0>)
        >>> y.sum().backward()
        >>> scale.grad
        tensor(3.)

    Reference:
        Steven K. Esser, Jeffrey L. McKinstry, Deepika Bablani, Rathinakumar Appuswamy, Dharmendra
        S. Modha. Learned Step Size Quantization. 2019. arXiv:1902.08153.
    """
    name = "lsq_quantize"
    _checks.integer(name, "lower", lower)
    if lower >= _checks.integer(name, "upper", upper):
        raise _checks.bad_value(name, "lower", f"below upper={upper}", lower)
    if gradient_scale is None and upper <= 0:
        raise _checks.bad_value(name, "upper", "above 0 without gradient_scale", upper)
    return learned(name, input, scale, int(lower), int(upper), gradient_scale)


def learned(
    name: str,
    input: Tensor,
    scale: Any,
    lower: int,
    upper: int,
    gradient_scale: float | None,
    argument: str = "input",
) -> Tensor:
    """What :func:`lsq_quantize` is, for a function and a tensor of other names."""
    _checks.floating(name, argument, input)
    if gradient_scale is not None:
        _checks.finite(name, "gradient_scale", gradient_scale)
    if isinstance(scale, Tensor):
        check_broadcastable(name, "scale", scale, input.shape)
    else:
        _checks.positive(name, "scale", scale)
        value = _checks.plain(scale)
        scale = torch.full((), value, dtype=computed(input), device=input.device)
    dtype = computed(input, scale)
    moving, step = input.to(dtype), scale.to(dtype)
    ratio = moving.detach() / step.detach()
    inside = (ratio >= lower) & (ratio <= upper)
    whole = ratio.round().clamp(lower, upper)
    slope = whole - ratio.where(inside, 0.0)
    if gradient_scale is None:
        gradient_scale = (_values_per_scale(input, scale) * upper) ** -0.5
    smooth = moving.where(inside, 0.0) + step * (slope * _checks.plain(gradient_scale))
    return straight_through(smooth, (step.detach() * whole)).to(input.dtype)


def _values_per_scale(input: Tensor, scale: Tensor) -> int:
    shape = [1] * (input.dim() - scale.dim()) + list(scale.shape)
    shared = [size for size, own in zip(input.shape, shape, strict=True) if own == 1]
    return math.prod(shared) or 1
