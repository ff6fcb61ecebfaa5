"""Products of activations and weights in integers."""

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import implements
from tilework.quant._arguments import computed
from tilework.quant.activations.quantize_activation import quantize_activation
from tilework.quant.rounding.w4a8_quantize import W4A8Tensor

__all__ = ["w4a8_linear"]

_EXACT_IN_INT32 = 132104
_EXACT_IN_FLOAT32 = 1024
"""Columns whose products of int8 sum up without rounding."""


@implements(
    "QQQ: Quality Quattuor-Bit Quantization for Large Language Models",
    year=2024,
    arxiv="2406.09904",
)
@torch.no_grad()
@without_autocast
def w4a8_linear(input: Tensor, quantized: W4A8Tensor, bias: Tensor | None = None) -> Tensor:
    r"""The product of activations and weights of :func:`w4a8_quantize` in integers.

    .. math::

        y = s_x \, (x_8 w_8^\top) \, c^\top + b

    where :math:`x_8, s_x` are those of :func:`quantize_activation` with 8 bits, and the product is
    exact.

    Args:
        input: Activations, of shape (..., in).
        quantized: Weights of shape (out, in).
        bias: Of shape (out,), or None.

    Returns:
        Of shape (..., out) and the dtype of ``input``; without gradients.

    Raises:
        ValueError: The last dimension of ``input`` is not that of the weights, or ``bias`` is of
            another shape.
        TypeError: ``quantized`` is not a :class:`W4A8Tensor`, or a tensor not of a real floating
            dtype.

    Example:
        >>> import torch
        >>> from tilework.quant import w4a8_linear, w4a8_quantize
        >>> quantized = w4a8_quantize(torch.tensor([[7.0, -3.0], [0.7, 0.1]]))
        >>> w4a8_linear(torch.tensor([[1.27, 0.5]]), quantized)
        tensor([[7.3900, 0.9390]])

    Reference:
        Ying Zhang, Peng Zhang, Mincong Huang, and others. QQQ: Quality Quattuor-Bit Quantization
        for Large Language Models. 2024. arXiv:2406.09904.
    """
    name = "w4a8_linear"
    _checks.floating(name, "input", input)
    if not isinstance(quantized, W4A8Tensor):
        raise _checks.bad_type(name, "quantized", "a W4A8Tensor", quantized)
    rows, columns = quantized.shape
    if not input.dim() or input.shape[-1] != columns:
        raise _checks.bad_value(name, "input", f"of shape (..., {columns})", input)
    if bias is not None:
        _checks.floating(name, "bias", bias)
        _checks.shape(name, "bias", bias, (rows,))
    codes, scale = quantize_activation(input)
    products = _integer_products(codes.reshape(-1, columns), quantized.int8_weight())
    dtype = computed(input, quantized.channel_scale)
    output = products.to(dtype) * scale.reshape(-1, 1) * quantized.channel_scale.mT
    if bias is not None:
        output = output + bias
    return output.to(input.dtype).reshape(*input.shape[:-1], rows)


def _integer_products(left: Tensor, right: Tensor) -> Tensor:
    """The exact products of the rows of two matrices of int8."""
    columns = left.shape[1]
    if columns > _EXACT_IN_INT32:
        halves = zip(left.tensor_split(2, 1), right.tensor_split(2, 1), strict=True)
        first, second = (_integer_products(*half) for half in halves)
        return first.long() + second.long()
    if left.is_cuda and (len(left) <= 16 or columns % 8 or len(right) % 8):
        count = -(-columns // _EXACT_IN_FLOAT32)
        parts = zip(left.tensor_split(count, 1), right.tensor_split(count, 1), strict=True)
        return torch.stack([(a.float() @ b.float().mT).int() for a, b in parts]).sum(0)
    return torch._int_mm(left, right.mT)
