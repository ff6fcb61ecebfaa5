"""Round to nearest: the codes of the nearest levels, without any statistics."""

import torch
from torch import Tensor

from tilework.catalog import without_paper
from tilework.quant._arguments import check_grid, check_grid_options, check_weight, computed
from tilework.quant.grids.fit_grid import fit_grid, quantize_affine
from tilework.quant.storage.quantized_tensor import QuantizedTensor

__all__ = ["rtn_quantize"]


@without_paper("rounding to nearest, which every algorithm is compared with")
@torch.no_grad()
def rtn_quantize(
    weight: Tensor,
    *,
    bits: int = 4,
    group_size: int | None = None,
    axis: str = "out",
    scheme: str = "asymmetric",
    mse: bool = False,
    grid: tuple[Tensor, Tensor] | None = None,
) -> QuantizedTensor:
    r"""Weights rounded to the nearest levels of the grids of their groups.

    The grid is that of :func:`fit_grid`, or the one given, and the codes are those of
    :func:`quantize_affine`.

    Args:
        weight: Weights, of shape (out, in).
        bits: Bits of a code, from 1 to 8; at least 2 for ``"symmetric"`` and ``"restricted"``.
        group_size: Weights of a group; None is a whole row or column.
        axis: ``"out"``, ``"in"`` or ``"tensor"``, as of :func:`fit_grid`.
        scheme: ``"asymmetric"``, ``"symmetric"``, ``"restricted"`` or ``"minmax"``, as of
            :func:`fit_grid`.
        mse: Whether ranges may be narrowed for a smaller error, as of :func:`fit_grid`.
        grid: Scale and zero-point in the place of fitted ones.

    Returns:
        The quantized weights; they dequantize to the dtype of ``weight``.

    Raises:
        ValueError: ``weight`` is not a finite non-empty matrix, an option is not one of those
            above, ``grid`` is of other shapes than :func:`fit_grid` gives, or comes with ``mse``.
        TypeError: ``weight`` is not of a real floating dtype, or a number is of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import rtn_quantize
        >>> quantized = rtn_quantize(torch.tensor([[-1.0, 0.4, 2.0]]), bits=2)
        >>> quantized.codes
        tensor([[0, 1, 3]], dtype=torch.uint8)
        >>> quantized.dequantize()
        tensor([[-1.,  0.,  2.]])

    Reference:
        Benoit Jacob, Skirmantas Kligys, Bo Chen, and others. Quantization and Training of Neural
        Networks for Efficient Integer-Arithmetic-Only Inference. 2017. arXiv:1712.05877.
    """
    name = "rtn_quantize"
    check_weight(name, weight)
    check_grid_options(name, bits=bits, group_size=group_size, scheme=scheme, axis=axis)
    if grid is None:
        scale, zero_point = fit_grid(
            weight, bits=bits, group_size=group_size, axis=axis, scheme=scheme, mse=mse
        )
    else:
        if mse:
            raise ValueError(f"{name}: mse must be False with a grid")
        scale, zero_point = grid
        check_grid(name, scale, zero_point, tuple(weight.shape), group_size, axis)
        dtype = computed(weight, scale, zero_point)
        scale, zero_point = scale.to(dtype), zero_point.to(dtype)
    codes = quantize_affine(
        weight,
        scale,
        zero_point,
        bits=bits,
        group_size=group_size,
        axis=axis,
        scheme=scheme,
    )
    return QuantizedTensor(
        codes, scale, zero_point, bits=bits, group_size=group_size, axis=axis, dtype=weight.dtype
    )
