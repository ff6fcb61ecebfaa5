"""Affine grids: where the levels of a group of weights lie, and the codes of the nearest ones."""

import torch
from torch import Tensor

from tilework.catalog import without_paper
from tilework.quant._arguments import (
    check_codes,
    check_granularity,
    check_grid,
    check_grid_options,
    check_weight,
    computed,
)
from tilework.quant._groups import as_rows, runs, spread

__all__ = ["dequantize_affine", "fit_grid", "quantize_affine"]

_SHRINKS = 80
_POWER = 2.4
_REASON = "the affine grids that post-training quantization is stated on"


@without_paper(_REASON)
@torch.no_grad()
def fit_grid(
    weight: Tensor,
    *,
    bits: int = 4,
    group_size: int | None = None,
    axis: str = "out",
    scheme: str = "asymmetric",
    mse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The scale and the zero-point of the grid of each group of weights.

    With :math:`Q = 2^b - 1` for ``bits`` :math:`b`, the levels of a group are :math:`s (q - z)` for
    the codes :math:`q = 0, \dots, Q`. With the smallest and the largest weight of the group,
    :math:`l` and :math:`h`, and :math:`a = \max \lvert w \rvert` (1 if that is 0), a ``scheme`` is

    - ``"asymmetric"``: :math:`l` at most 0 and :math:`h` at least 0 (-1 and 1 if both are 0),
      :math:`s = (h - l) / Q` and :math:`z = \mathrm{round}(-l / s)`, so that 0 is a level;
    - ``"symmetric"``: :math:`s = 2 a / Q` and :math:`z = 2^{b - 1}`;
    - ``"restricted"``: :math:`s = a / (2^{b - 1} - 1)` and :math:`z = 2^{b - 1}`, without the code
      0, so that the levels are symmetric;
    - ``"minmax"``: :math:`s = (h - l) / Q` and :math:`z = -l / s`, which is not rounded; a group of
      equal weights has one of the ends at 0.

    Rounding is to the nearest, ties to the even code, which moves a weight by at most
    :math:`s / 2`. With ``mse`` the scale is the one among :math:`s (1 - k / 100)`,
    :math:`k = 0, \dots, 79`, that has the smallest :math:`\sum \lvert \hat w - w \rvert^{2.4}`.

    Args:
        weight: Weights, of shape (out, in).
        bits: Bits of a code, from 1 to 8; at least 2 for ``"symmetric"`` and ``"restricted"``.
        group_size: Weights of a group; None is a whole row or column. The last group of a row is
            shorter where the size does not divide the row.
        axis: Groups run along the rows for ``"out"``, down the columns for ``"in"``, and
            ``"tensor"`` is one group.
        scheme: ``"asymmetric"``, ``"symmetric"``, ``"restricted"`` or ``"minmax"``.
        mse: Whether ranges may be narrowed for a smaller error.

    Returns:
        Scale and zero-point, float64 for float64 weights and float32 otherwise, both of shape
        (out, groups) for ``"out"``, (groups, in) for ``"in"`` and (1, 1) for ``"tensor"``.

    Raises:
        ValueError: ``weight`` is not a finite non-empty matrix, or an option is not one of those
            above.
        TypeError: ``weight`` is not of a real floating dtype, or a number is of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import fit_grid
        >>> scale, zero_point = fit_grid(torch.tensor([[-1.0, 0.0, 2.0]]), bits=2)
        >>> scale, zero_point
        (tensor([[1.]]), tensor([[1.]]))

    Deviations:
        The original code of GPTQ, asked for a symmetric grid of positive weights, clips half of the
        range; here the grid is symmetric always. Those of AWQ and AdaDim clip groups that do not
        contain 0, and that of SpQR does not represent a group of equal weights.

    Reference:
        Benoit Jacob, Skirmantas Kligys, Bo Chen, and others. Quantization and Training of Neural
        Networks for Efficient Integer-Arithmetic-Only Inference. 2017. arXiv:1712.05877.
    """
    name = "fit_grid"
    check_weight(name, weight)
    check_grid_options(name, bits=bits, group_size=group_size, scheme=scheme, axis=axis)
    rows = as_rows(weight.to(computed(weight)), axis)
    grids = [
        _fit(rows[:, run.columns].reshape(len(rows), -1, run.size), bits, scheme, mse)
        for run in runs(rows.shape[1], group_size)
    ]
    scale, zero_point = (torch.cat(parts, 1) for parts in zip(*grids, strict=True))
    if axis == "in":
        return scale.mT.contiguous(), zero_point.mT.contiguous()
    return scale, zero_point


def lowest_code(scheme: str) -> int:
    """The smallest code that a scheme uses."""
    return 1 if scheme == "restricted" else 0


def _fit(groups: Tensor, bits: int, scheme: str, mse: bool) -> tuple[Tensor, Tensor]:
    """Of each group along the last dimension."""
    levels = 2**bits - 1
    low, high = groups.aminmax(dim=-1)
    if scheme in ("asymmetric", "minmax"):
        varies = (low < high) & (scheme == "minmax")
        low, high = low.where(varies, low.clamp(max=0)), high.where(varies, high.clamp(min=0))
        empty = (low == 0) & (high == 0)
        low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
        scale = (high - low) / levels
        zero_point = -low / scale
        if scheme == "asymmetric":
            zero_point = zero_point.round()
    else:
        most = torch.maximum(-low, high)
        most = most.masked_fill(most == 0, 1.0)
        scale = 2 * most / levels if scheme == "symmetric" else most / (2 ** (bits - 1) - 1)
        zero_point = torch.full_like(scale, 2 ** (bits - 1))
    if mse:
        scale = _narrowed(groups, scale, zero_point, levels, lowest_code(scheme))
    return scale, zero_point


def _narrowed(
    groups: Tensor, scale: Tensor, zero_point: Tensor, levels: int, lowest: int
) -> Tensor:
    best, least = scale, torch.full_like(scale, torch.inf)
    for k in range(_SHRINKS):
        tried = (1 - k / 100) * scale
        codes = _codes(groups, tried.unsqueeze(-1), zero_point.unsqueeze(-1), levels, lowest)
        values = tried.unsqueeze(-1) * (codes - zero_point.unsqueeze(-1))
        error = (values - groups).abs_().pow_(_POWER).sum(-1)
        better = error < least
        best, least = tried.where(better, best), error.where(better, least)
    return best


def _codes(weight: Tensor, scale: Tensor, zero_point: Tensor, levels: int, lowest: int) -> Tensor:
    return (weight / scale).add_(zero_point).round_().clamp_(lowest, levels)


@without_paper(_REASON)
@torch.no_grad()
def quantize_affine(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int = 4,
    group_size: int | None = None,
    axis: str = "out",
    scheme: str = "asymmetric",
) -> Tensor:
    r"""The code of the level of a grid that is nearest to each weight.

    .. math::

        q = \min(\max(\mathrm{round}(w / s + z), q_0), 2^b - 1)

    with ``scale`` :math:`s`, ``zero_point`` :math:`z`, ``bits`` :math:`b`, :math:`q_0 = 1` for the
    scheme ``"restricted"`` and 0 for the others. Ties are rounded to the even code.

    Args:
        weight: Weights, of shape (out, in).
        scale: Scales as of :func:`fit_grid`.
        zero_point: Zero-points as of :func:`fit_grid`.
        bits: Bits of a code, from 1 to 8; at least 2 for ``"symmetric"`` and ``"restricted"``.
        group_size: Weights of a group, as of :func:`fit_grid`.
        axis: Where groups run, as of :func:`fit_grid`.
        scheme: The scheme of the grid.

    Returns:
        Codes, uint8 of the shape of ``weight``.

    Raises:
        ValueError: ``weight`` is not a finite non-empty matrix, a grid is not of the shape that
            :func:`fit_grid` gives, or an option is not one of those above.
        TypeError: A tensor is not of a real floating dtype, or a number is of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import quantize_affine
        >>> one = torch.ones(1, 1)
        >>> quantize_affine(torch.tensor([[-1.0, 0.4, 7.0]]), one, one, bits=2)
        tensor([[0, 1, 3]], dtype=torch.uint8)

    Reference:
        Benoit Jacob, Skirmantas Kligys, Bo Chen, and others. Quantization and Training of Neural
        Networks for Efficient Integer-Arithmetic-Only Inference. 2017. arXiv:1712.05877.
    """
    name = "quantize_affine"
    check_weight(name, weight)
    check_grid_options(name, bits=bits, group_size=group_size, scheme=scheme, axis=axis)
    shape = tuple(weight.shape)
    check_grid(name, scale, zero_point, shape, group_size, axis)
    dtype = computed(weight, scale, zero_point)
    scale, zero_point = (
        spread(grid.to(dtype), shape, group_size, axis) for grid in (scale, zero_point)
    )
    codes = _codes(weight.to(dtype), scale, zero_point, 2**bits - 1, lowest_code(scheme))
    return codes.to(torch.uint8)


@without_paper(_REASON)
def dequantize_affine(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    group_size: int | None = None,
    axis: str = "out",
) -> Tensor:
    r"""The levels :math:`s (q - z)` of a grid that codes stand for.

    Args:
        codes: Codes :math:`q`, of an integer dtype, of shape (out, in).
        scale: Scales :math:`s` as of :func:`fit_grid`.
        zero_point: Zero-points :math:`z` as of :func:`fit_grid`.
        group_size: Weights of a group, as of :func:`fit_grid`.
        axis: Where groups run, as of :func:`fit_grid`.

    Returns:
        Weights of the shape of ``codes`` and the dtype of ``scale``.

    Raises:
        ValueError: ``codes`` is not a non-empty matrix, a grid is not of the shape that
            :func:`fit_grid` gives, or an option is not one of those above.
        TypeError: ``codes`` is not of an integer dtype, or a grid not of a real floating one.

    Example:
        >>> import torch
        >>> from tilework.quant import dequantize_affine
        >>> codes = torch.tensor([[0, 1, 3]], dtype=torch.uint8)
        >>> dequantize_affine(codes, torch.tensor([[0.5]]), torch.tensor([[1.0]]))
        tensor([[-0.5000,  0.0000,  1.0000]])

    Reference:
        Benoit Jacob, Skirmantas Kligys, Bo Chen, and others. Quantization and Training of Neural
        Networks for Efficient Integer-Arithmetic-Only Inference. 2017. arXiv:1712.05877.
    """
    name = "dequantize_affine"
    check_codes(name, codes)
    check_granularity(name, group_size, axis)
    shape = tuple(codes.shape)
    check_grid(name, scale, zero_point, shape, group_size, axis)
    scale, zero_point = (spread(grid, shape, group_size, axis) for grid in (scale, zero_point))
    return scale * (codes.to(scale.dtype) - zero_point)
