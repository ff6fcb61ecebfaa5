"""Weights of 4 bits, which become int8, for products with activations of 8 bits."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import implements
from tilework.quant._arguments import (
    check_codes,
    check_granularity,
    check_hessian,
    check_weight,
)
from tilework.quant._groups import grid_shape, spread
from tilework.quant.grids.rtn_quantize import rtn_quantize
from tilework.quant.rounding._grid_rounding import SCALES
from tilework.quant.rounding.gptq_quantize import rounded_with_compensation
from tilework.quant.storage._stored import StoredWeights

__all__ = ["W4A8Tensor", "w4a8_quantize"]

_PAPER = implements(
    "QQQ: Quality Quattuor-Bit Quantization for Large Language Models",
    year=2024,
    arxiv="2406.09904",
)
_MIDDLE = 8


@_PAPER
@dataclass(frozen=True, eq=False, repr=False)
class W4A8Tensor(StoredWeights):
    r"""Weights as codes of 4 bits, which scales of groups turn into int8.

    .. math::

        w_8 = \min(\max(\mathrm{round}((q - 8) r_{o g(j)}), -128), 127), \qquad
        \hat W_{oj} = c_o w_8

    with ``codes`` :math:`q`, ``group_scale`` :math:`r` (1 without groups, where nothing is
    rounded), and ``channel_scale`` :math:`c`.

    Args:
        codes: Codes from 0 to 15, uint8 of shape (out, in).
        group_scale: Of shape (out, groups); None without groups.
        channel_scale: Of shape (out, 1).
        group_size: Weights of a group; None is a whole row.

    Raises:
        ValueError: A tensor does not fit the others.
        TypeError: A tensor is not of the dtype that it must have.

    Example:
        >>> import torch
        >>> from tilework.quant import w4a8_quantize
        >>> quantized = w4a8_quantize(torch.tensor([[7.0, -3.0], [0.7, 0.1]]))
        >>> quantized.int8_weight()
        tensor([[ 7, -3],
                [ 7,  1]], dtype=torch.int8)
        >>> quantized.dequantize()
        tensor([[ 7.0000, -3.0000],
                [ 0.7000,  0.1000]])

    Reference:
        Ying Zhang, Peng Zhang, Mincong Huang, and others. QQQ: Quality Quattuor-Bit Quantization
        for Large Language Models. 2024. arXiv:2406.09904.
    """

    codes: Tensor
    group_scale: Tensor | None
    channel_scale: Tensor
    group_size: int | None = None

    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_codes(name, self.codes)
        if self.codes.dtype != torch.uint8:
            raise _checks.bad_type(name, "codes", "a tensor of uint8", self.codes)
        check_granularity(name, self.group_size)
        _checks.floating(name, "channel_scale", self.channel_scale)
        _checks.shape(name, "channel_scale", self.channel_scale, (len(self.codes), 1))
        if (self.group_scale is None) != (self.group_size is None):
            raise ValueError(f"{name}: group_scale and group_size come together")
        if self.group_scale is not None:
            _checks.floating(name, "group_scale", self.group_scale)
            expected = grid_shape(self.shape, self.group_size, "out")
            _checks.shape(name, "group_scale", self.group_scale, expected)
        _checks.same_device(name, **self.tensors())

    @property
    def shape(self) -> torch.Size:
        """Of the weights: (out, in)."""
        return self.codes.shape

    def int8_weight(self) -> Tensor:
        """The weights that products are made with.

        Returns:
            :math:`w_8`, int8 of shape (out, in).
        """
        centred = self.codes.to(torch.int8) - _MIDDLE
        if self.group_scale is None:
            return centred
        scale = spread(self.group_scale, tuple(self.shape), self.group_size, "out")
        return (centred.to(scale.dtype) * scale).round().clamp(-128, 127).to(torch.int8)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights that the codes stand for.

        Args:
            dtype: In the place of that of ``channel_scale``.

        Returns:
            Weights of shape (out, in).
        """
        weight = self.channel_scale * self.int8_weight().to(self.channel_scale.dtype)
        return weight.to(dtype or weight.dtype)

    def __repr__(self) -> str:
        """In one line, without values."""
        groups = "a row" if self.group_size is None else f"groups of {self.group_size}"
        return f"{type(self).__name__}({tuple(self.shape)}, {groups})"


@_PAPER
@torch.no_grad()
@without_autocast
def w4a8_quantize(
    weight: Tensor,
    hessian: Tensor | None = None,
    *,
    group_size: int | None = None,
    scales: str = "fresh",
    block_size: int = 128,
    damp: float = 0.01,
) -> W4A8Tensor:
    r"""Weights rounded to 4 bits, whose codes become int8 by scales of groups.

    Without groups, codes are those of the scheme ``"restricted"`` of :func:`fit_grid`, with the
    scale of each row as its :math:`c_o`. With groups, they are of the scheme ``"symmetric"``; with
    its scales :math:`s_g` and weights :math:`\hat W`:

    .. math::

        c_o = \frac{\max_j \lvert \hat W_{oj} \rvert}{127}, \qquad r = s_g / c_o

    and :math:`c_o = 1` for a row of zeros.

    Args:
        weight: Weights, of shape (out, in).
        hessian: As of :class:`HessianAccumulator`, of shape (in, in), for codes as of
            :func:`gptq_quantize`; None rounds to nearest.
        group_size: Weights of a group; None is a whole row.
        scales: As of :func:`gptq_quantize`, like what follows.
        block_size: Columns that are computed together.
        damp: What is added to the diagonal of the Hessian, in units of its mean, at least 0.

    Returns:
        The quantized weights.

    Raises:
        ValueError: A tensor is not of the shape above or not finite, the damped Hessian is not
            positive definite, or an option is not one of those above.
        TypeError: A tensor is not of a real floating dtype, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import w4a8_quantize
        >>> quantized = w4a8_quantize(torch.tensor([[7.0, -3.5, 0.1, 0.7]]), group_size=2)
        >>> quantized.codes
        tensor([[15,  4,  9, 15]], dtype=torch.uint8)
        >>> quantized.int8_weight()
        tensor([[127, -73,   2,  13]], dtype=torch.int8)

    Deviations:
        The released kernels shift codes into the upper half of a byte and keep scales of groups in
        float16, which is their layout, not another result.

    Reference:
        As :class:`W4A8Tensor`.
    """
    name = "w4a8_quantize"
    check_weight(name, weight)
    check_granularity(name, group_size)
    _checks.one_of(name, "scales", scales, SCALES)
    _checks.count(name, "block_size", block_size)
    _checks.at_least(name, "damp", damp, 0)
    scheme = "restricted" if group_size is None else "symmetric"
    if hessian is None:
        rounded = rtn_quantize(weight, bits=4, group_size=group_size, scheme=scheme)
    else:
        check_hessian(name, hessian, weight.shape[1])
        rounded = rounded_with_compensation(
            name,
            weight,
            hessian,
            bits=4,
            group_size=group_size,
            scheme=scheme,
            scales=scales,
            block_size=block_size,
            damp=damp,
        )
    if group_size is None:
        return W4A8Tensor(rounded.codes, None, rounded.scale)
    largest = rounded.dequantize(rounded.scale.dtype).abs().amax(1, keepdim=True)
    channel = (largest / 127).masked_fill(largest == 0, 1.0)
    return W4A8Tensor(rounded.codes, rounded.scale / channel, channel, group_size)
