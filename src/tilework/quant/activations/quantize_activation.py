"""Activations as codes of 8 bits or fewer, with a scale for each row."""

import torch
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.quant._arguments import check_bits, computed

__all__ = ["quantize_activation"]


@implements(
    "QQQ: Quality Quattuor-Bit Quantization for Large Language Models",
    year=2024,
    arxiv="2406.09904",
)
@torch.no_grad()
def quantize_activation(input: Tensor, *, bits: int = 8) -> tuple[Tensor, Tensor]:
    r"""Codes of activations, and the scale of each row.

    For each row :math:`x` along the last dimension, with ``bits`` :math:`b`:

    .. math::

        s = \frac{\max \lvert x \rvert}{2^{b - 1} - 1}, \qquad q = \mathrm{round}(x / s)

    and :math:`s = 1` for a row of zeros.

    Args:
        input: Activations, of shape (..., features).
        bits: Bits of a code, from 2 to 8.

    Returns:
        Codes, int8 of the shape of ``input``, and scales, of shape (..., 1), float64 for float64
        activations and otherwise float32. Neither has a gradient.

    Raises:
        ValueError: ``input`` has no features, or, on a CPU, is not finite; or ``bits`` is out of
            range.
        TypeError: ``input`` is not of a real floating dtype, or ``bits`` not an int.

    Example:
        >>> import torch
        >>> from tilework.quant import quantize_activation
        >>> quantize_activation(torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0]]), bits=3)
        (tensor([[ 2, -3,  1],
                [ 0,  0,  0]], dtype=torch.int8), tensor([[0.3333],
                [1.0000]]))

    Reference:
        Ying Zhang, Peng Zhang, Mincong Huang, and others. QQQ: Quality Quattuor-Bit Quantization
        for Large Language Models. 2024. arXiv:2406.09904.
    """
    name = "quantize_activation"
    _checks.floating(name, "input", input)
    if not input.dim() or not input.shape[-1]:
        raise _checks.bad_value(name, "input", "of shape (..., features)", input)
    check_bits(name, bits, 2)
    if _checks.holds_values(input) and not input.isfinite().all():
        raise ValueError(f"{name}: input must be finite everywhere")
    values = input.to(computed(input))
    scale = values.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = scale.masked_fill(scale == 0, 1.0)
    return (values / scale).round().to(torch.int8), scale
