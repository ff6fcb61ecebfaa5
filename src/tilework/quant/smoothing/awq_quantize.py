"""AWQ: channels with large inputs are scaled up before weights are rounded, and ranges narrowed."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import implements
from tilework.quant._arguments import (
    check_grid_options,
    check_weight,
    computed,
    rows_of,
)
from tilework.quant._groups import runs, spread
from tilework.quant.grids.rtn_quantize import rtn_quantize
from tilework.quant.smoothing._search import Forward, output_error, reduced, smallest
from tilework.quant.storage.quantized_tensor import QuantizedTensor

__all__ = ["AWQScale", "awq_quantize", "awq_search_clip", "awq_search_scale"]

_PAPER = implements(
    "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    year=2023,
    arxiv="2306.00978",
)
_LEAST = 1e-4


@_PAPER
class AWQScale(NamedTuple):
    """What :func:`awq_search_scale` found.

    Args:
        scale: A factor for each input, of shape (in,).
        alpha: The exponent that it was found with.
        errors: The error of each exponent, of shape (grid,).

    Example:
        >>> import torch
        >>> from tilework.quant import awq_search_scale
        >>> weight = torch.tensor([[0.4, 3.0], [0.6, -3.0]])
        >>> found = awq_search_scale(weight, torch.tensor([[8.0, 1.0]]), bits=2, grid=4)
        >>> found.alpha, found.scale
        (0.5, tensor([1.6818, 0.5946]))

    Reference:
        Ji Lin, Jiaming Tang, Haotian Tang, Shang Yang, Wei-Ming Chen, Wei-Chen Wang, Guangxuan
        Xiao, Xingyu Dang, Chuang Gan, Song Han. AWQ: Activation-aware Weight Quantization for LLM
        Compression and Acceleration. 2023. arXiv:2306.00978.
    """

    scale: Tensor
    alpha: float
    errors: Tensor


@_PAPER
@torch.no_grad()
@without_autocast
def awq_search_scale(
    weight: Tensor | Sequence[Tensor],
    input: Tensor,
    *,
    bits: int = 4,
    group_size: int | None = 128,
    scheme: str = "asymmetric",
    grid: int = 20,
    forward: Forward | None = None,
) -> AWQScale:
    r"""The powers of mean magnitudes of inputs that weights are best multiplied by before rounding.

    With :math:`m` the mean of :math:`\lvert x \rvert` over the rows :math:`x` of ``input``, and
    :math:`Q` rounding to nearest, for :math:`\alpha = 0, 1/\texttt{grid}, \dots` below 1:

    .. math::

        u = \max(m^\alpha, 10^{-4}), \qquad t = \frac{u}{\sqrt{\max(u) \min(u)}}, \qquad
        \tilde W = Q(W \, \mathrm{diag}(t)) \, \mathrm{diag}(1/t)

    and the :math:`t` is taken whose :math:`\tilde W` has the least mean of
    :math:`(f(\tilde W) - f(W))^2`, the first one if several have it. :math:`\alpha = 0` is plain
    rounding.

    Args:
        weight: Weights of shape (out, in), or a list of those of layers that read the same input.
        input: Inputs of shape (..., in).
        bits: Bits of a code, from 1 to 8; at least 2 for ``"symmetric"`` and ``"restricted"``.
        group_size: Weights of a group; None is a whole row.
        scheme: ``"asymmetric"``, ``"symmetric"``, ``"restricted"`` or ``"minmax"``, as of
            :func:`fit_grid`.
        grid: The number of exponents that are tried, at least 1.
        forward: The output :math:`f` of a block for a list of weights; None is the outputs
            :math:`X W^\top` of all of them.

    Returns:
        The factors, their exponent and all errors, float64 if a tensor is, otherwise float32.

    Raises:
        ValueError: A tensor is empty, not finite or of a shape that does not fit, or an option is
            not one of those above.
        TypeError: A tensor is not of a real floating dtype, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import awq_search_scale
        >>> weight = torch.tensor([[0.4, 3.0], [0.6, -3.0]])
        >>> awq_search_scale(weight, torch.tensor([[8.0, 1.0]]), bits=2, grid=4).alpha
        0.5

    Deviations:
        Grids contain 0, so that groups of one sign are not clipped.

    Reference:
        As :class:`AWQScale`.
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    if not weights:
        raise ValueError("awq_search_scale: weight must be at least one tensor, got none")
    options = {"bits": bits, "group_size": group_size, "scheme": scheme}
    return _search_scale("awq_search_scale", weights, input, options, grid, forward)


def _search_scale(
    name: str,
    weights: list[Tensor],
    input: Tensor,
    options: dict[str, Any],
    grid: int,
    forward: Forward | None = None,
) -> AWQScale:
    rows = _checked(name, weights, input, options, grid)
    dtype = computed(*weights, input)
    weights, rows = [one.to(dtype) for one in weights], rows.to(dtype)
    mean = rows.abs().mean(0)
    error = output_error(name, rows, weights, forward)
    scales, errors = [], []
    for k in range(grid):
        powers = mean.pow(k / grid).clamp(min=_LEAST)
        scale = powers / (powers.max() * powers.min()).sqrt()
        rounded = [rtn_quantize(one * scale, **options).dequantize() / scale for one in weights]
        scales.append(scale)
        errors.append(error(rounded))
    found = torch.stack(errors)
    best = smallest(name, found)
    return AWQScale(scales[best], best / grid, found)


def _checked(
    name: str, weights: list[Tensor], input: Tensor, options: dict[str, Any], grid: int
) -> Tensor:
    """The rows of the inputs, if all arguments are as they must be."""
    for weight in weights:
        check_weight(name, weight)
        _checks.shape(name, "weight", weight, (weight.shape[0], weights[0].shape[1]))
        _checks.same_device(name, weight=weight, input=input)
    check_grid_options(name, **options)
    _checks.count(name, "grid", grid)
    return rows_of(name, input, weights[0].shape[1])


@_PAPER
@torch.no_grad()
@without_autocast
def awq_search_clip(
    weight: Tensor,
    input: Tensor,
    *,
    bits: int = 4,
    group_size: int | None = 128,
    scheme: str = "asymmetric",
    grid: int = 20,
    max_shrink: float = 0.5,
    max_tokens: int = 512,
) -> Tensor:
    r"""The magnitude that the weights of each group are best clamped to before rounding.

    For each row and group :math:`w`, and for :math:`k = 0` and further ones below
    :math:`\lfloor \texttt{max\_shrink} \cdot \texttt{grid} \rfloor`:

    .. math::

        c_k = \max \lvert w \rvert \left( 1 - \frac{k}{\texttt{grid}} \right), \qquad
        \tilde w = Q(\min(\max(w, -c_k), c_k))

    with :math:`Q` rounding to nearest with the group's own grid, and the :math:`c_k` is taken with
    the least mean of :math:`(x^\top (\tilde w - w))^2` over rows of the group's inputs :math:`x`,
    the first one if several have it.

    Args:
        weight: Weights of shape (out, in).
        input: Inputs of shape (..., in).
        bits: Bits of a code, from 1 to 8; at least 2 for ``"symmetric"`` and ``"restricted"``.
        group_size: Weights of a group; None is a whole row.
        scheme: As of :func:`fit_grid`.
        grid: Into how many steps the magnitude is divided, at least 1.
        max_shrink: The part of it that may be taken away, above 0 and at most 1.
        max_tokens: Of ``n`` rows, every ``n // max_tokens``-th is used.

    Returns:
        Magnitudes of shape (out, groups), float64 if a tensor is, otherwise float32.

    Raises:
        ValueError: A tensor is empty, not finite or of a shape that does not fit, or an option is
            not one of those above.
        TypeError: A tensor is not of a real floating dtype, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import awq_search_clip
        >>> weight = torch.tensor([[0.5, 0.5, 0.5, 2.0]])
        >>> input = torch.tensor([[8.0, -8.0, 8.0, 0.1]])
        >>> awq_search_clip(weight, input, bits=1, grid=4, max_shrink=1.0)
        tensor([[0.5000]])

    Deviations:
        The released code fails for fewer rows than ``max_tokens``.

    Reference:
        As :class:`AWQScale`.
    """
    options = {"bits": bits, "group_size": group_size, "scheme": scheme}
    return _search_clip("awq_search_clip", weight, input, options, grid, max_tokens, max_shrink)


def _search_clip(
    name: str,
    weight: Tensor,
    input: Tensor,
    options: dict[str, Any],
    grid: int,
    max_tokens: int,
    max_shrink: float = 0.5,
) -> Tensor:
    rows = _checked(name, [weight], input, options, grid)
    _checks.positive_fraction(name, "max_shrink", max_shrink)
    _checks.count(name, "max_tokens", max_tokens)
    group_size: int | None = options["group_size"]
    dtype = computed(weight, input)
    weight, rows = weight.to(dtype), rows[:: max(1, len(rows) // max_tokens)].to(dtype)
    factors = [
        reduced(rows[:, run.columns].reshape(len(rows), -1, run.size).transpose(0, 1))
        for run in runs(weight.shape[1], group_size)
    ]
    largest = _largest(weight, group_size)
    best, least = largest, torch.full_like(largest, torch.inf)
    for k in range(max(math.floor(max_shrink * grid), 1)):
        clip = largest * (1 - k / grid)
        rounded = rtn_quantize(_clamped(weight, clip, group_size), **options)
        error = _errors(rounded.dequantize() - weight, factors, group_size)
        better = error < least
        best, least = clip.where(better, best), error.where(better, least)
    return best


def _clamped(weight: Tensor, clip: Tensor, group_size: int | None) -> Tensor:
    limit = spread(clip, tuple(weight.shape), group_size, "out")
    return weight.clamp(-limit, limit)


def _largest(weight: Tensor, group_size: int | None) -> Tensor:
    """The largest magnitude of each group."""
    parts = [
        weight[:, run.columns].reshape(len(weight), -1, run.size).abs().amax(-1)
        for run in runs(weight.shape[1], group_size)
    ]
    return torch.cat(parts, 1)


def _errors(change: Tensor, factors: list[Tensor], group_size: int | None) -> Tensor:
    """The squared length of what a change of weights changes in the products of each group."""
    parts = []
    for run, factor in zip(runs(change.shape[1], group_size), factors, strict=True):
        groups = change[:, run.columns].reshape(len(change), -1, run.size).transpose(0, 1)
        parts.append((groups @ factor.mT).square_().sum(-1).mT)
    return torch.cat(parts, 1)


@_PAPER
@torch.no_grad()
@without_autocast
def awq_quantize(
    weight: Tensor,
    input: Tensor,
    *,
    bits: int = 4,
    group_size: int | None = 128,
    scheme: str = "asymmetric",
    grid: int = 20,
    clip: bool = True,
    max_tokens: int = 512,
) -> QuantizedTensor:
    r"""Weights rounded to nearest after their inputs' channels are scaled and ranges narrowed.

    With the factors :math:`t` of :func:`awq_search_scale`, :math:`W' = W \, \mathrm{diag}(t)` is
    clamped to the magnitudes that :func:`awq_search_clip` gives for it and the inputs divided by
    :math:`t`, and rounded; then :math:`\hat W = \hat W' \, \mathrm{diag}(1/t)`.

    Args:
        weight: Weights of shape (out, in).
        input: Inputs of shape (..., in).
        bits: Bits of a code, from 1 to 8; at least 2 for ``"symmetric"`` and ``"restricted"``.
        group_size: Weights of a group; None is a whole row.
        scheme: As of :func:`fit_grid`.
        grid: The number of exponents that are tried, at least 1, and of steps of a magnitude.
        clip: Whether ranges are narrowed.
        max_tokens: Of ``n`` rows, the search of magnitudes uses every ``n // max_tokens``-th.

    Returns:
        The quantized weights, with :math:`t` as ``input_scale``; they dequantize to the dtype of
        ``weight``. To fold :math:`t` into the layer before instead, see :func:`apply_scale_`.

    Raises:
        ValueError: A tensor is empty, not finite or of a shape that does not fit, or an option is
            not one of those above.
        TypeError: A tensor is not of a real floating dtype, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import awq_quantize
        >>> weight = torch.tensor([[0.4, 3.0], [0.6, -3.0]])
        >>> quantized = awq_quantize(weight, torch.tensor([[8.0, 1.0]]), bits=2, grid=4)
        >>> quantized.dequantize()
        tensor([[ 0.5303,  2.2500],
                [ 0.5536, -3.1314]])

    Deviations:
        As of the two searches. Leaving out layers, such as those of queries and keys, is the
        caller's choice, not one by names.

    Reference:
        As :class:`AWQScale`.
    """
    name = "awq_quantize"
    options = {"bits": bits, "group_size": group_size, "scheme": scheme}
    _checks.count(name, "max_tokens", max_tokens)
    scale = _search_scale(name, [weight], input, options, grid).scale
    scaled = weight.to(scale.dtype) * scale
    if clip:
        limit = _search_clip(name, scaled, input / scale, options, grid, max_tokens)
        scaled = _clamped(scaled, limit, group_size)
    rounded = rtn_quantize(scaled, **options)  # type: ignore[arg-type]
    return replace(rounded, input_scale=scale, dtype=weight.dtype)
