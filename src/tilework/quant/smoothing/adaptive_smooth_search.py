"""QQQ's search for the channels of inputs that are scaled down before both sides are rounded."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import implements
from tilework.quant._arguments import (
    check_bits,
    check_granularity,
    check_weight,
    computed,
    rows_of,
)
from tilework.quant.activations.quantize_activation import quantize_activation
from tilework.quant.grids.rtn_quantize import rtn_quantize
from tilework.quant.smoothing._search import smallest

__all__ = ["SmoothResult", "adaptive_smooth_search"]

_PAPER = implements(
    "QQQ: Quality Quattuor-Bit Quantization for Large Language Models",
    year=2024,
    arxiv="2406.09904",
)
_LEAST = 0.1


@_PAPER
class SmoothResult(NamedTuple):
    """What :func:`adaptive_smooth_search` found.

    Args:
        scale: What each channel of inputs is to be divided by, of shape (in,).
        threshold: The magnitude to which inputs are brought down.
        loss: The error with it.
        losses: The errors of all thresholds, the largest threshold first.

    Example:
        >>> import torch
        >>> from tilework.quant import adaptive_smooth_search
        >>> found = adaptive_smooth_search(torch.eye(2), torch.tensor([[8.0, 0.1]]), num=4)
        >>> found.loss == found.losses.min()
        tensor(True)

    Reference:
        Ying Zhang, Peng Zhang, Mincong Huang, and others. QQQ: Quality Quattuor-Bit Quantization
        for Large Language Models. 2024. arXiv:2406.09904.
    """

    scale: Tensor
    threshold: float
    loss: float
    losses: Tensor


@_PAPER
@torch.no_grad()
@without_autocast
def adaptive_smooth_search(
    weight: Tensor | Sequence[Tensor],
    input: Tensor,
    *,
    weight_bits: int = 4,
    activation_bits: int = 8,
    group_size: int | None = None,
    num: int | None = None,
    forward: Callable[..., Tensor] | None = None,
) -> SmoothResult:
    r"""What channels of inputs are best divided by before both weights and inputs are rounded.

    With :math:`A = \max(0, \max x)` and :math:`B = \max(A, -\min x)` over all inputs, and the
    thresholds :math:`t_k = B - k (B - 0.1) / \texttt{num}` for :math:`k = 0, \dots, \texttt{num}`,
    the factor of channel :math:`c` is

    .. math::

        s_c = \max\left(1, \frac{\max x_c}{t}, \frac{-\min x_c}{t}\right)

    and the loss the mean over rows of :math:`\sum_o (f(Q_a(x / s), Q_w(W \, \mathrm{diag}(s))) -
    f(x, W))^2`, where :math:`Q_a` is :func:`quantize_activation` and :math:`Q_w` rounding to
    nearest, of the scheme ``"restricted"`` without groups and ``"symmetric"`` with them. The
    smallest loss is taken, with the largest threshold if several have it. For :math:`B \le 0.1`,
    the only threshold is :math:`B`, which changes nothing.

    Args:
        weight: Weights of shape (out, in), or a list of those of layers that read the same input.
        input: Inputs of shape (..., in).
        weight_bits: Bits of the codes of weights, from 2 to 8.
        activation_bits: Bits of the codes of inputs, from 2 to 8.
        group_size: Weights of a group; None is a whole row.
        num: The number of steps, at least 1; None is :math:`\max(100, \lfloor A / 0.5 \rfloor)`.
        forward: The output :math:`f` for inputs and weights, or a list of these as ``weight`` is
            one; None is the outputs :math:`x W^\top` of all of them.

    Returns:
        The factors, their threshold and loss, and all losses.

    Raises:
        ValueError: A tensor is empty, not finite or of a shape that does not fit, or an option is
            not one of those above.
        TypeError: A tensor is not of a real floating dtype, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import adaptive_smooth_search
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 16)
        >>> x[:, 3] *= 50
        >>> found = adaptive_smooth_search(torch.randn(8, 16), x)
        >>> bool(found.scale[3] > 1), bool(found.loss < found.losses[0])
        (True, True)

    Deviations:
        Inputs have a scale for each row; the released search may also have one for all.

    Reference:
        As :class:`SmoothResult`.
    """
    name = "adaptive_smooth_search"
    is_one = isinstance(weight, Tensor)
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    if not weights:
        raise ValueError(f"{name}: weight must be at least one tensor, got none")
    for one in weights:
        check_weight(name, one)
        _checks.shape(name, "weight", one, (one.shape[0], weights[0].shape[1]))
        _checks.same_device(name, weight=one, input=input)
    rows = rows_of(name, input, weights[0].shape[1])
    check_bits(name, weight_bits, 2, "weight_bits")
    check_bits(name, activation_bits, 2, "activation_bits")
    check_granularity(name, group_size)
    if num is not None:
        _checks.count(name, "num", num)
    dtype = computed(*weights, input)
    weights, rows = [one.to(dtype) for one in weights], rows.to(dtype)
    scheme = "restricted" if group_size is None else "symmetric"
    options: dict[str, Any] = {"bits": weight_bits, "group_size": group_size, "scheme": scheme}

    def outputs(rows: Tensor, weights: list[Tensor]) -> Tensor:
        if forward is None:
            return torch.cat([rows @ one.mT for one in weights], 1)
        return forward(rows, weights[0] if is_one else weights)

    target = outputs(rows, weights)
    if not isinstance(target, Tensor):
        raise _checks.bad_type(name, "forward", "a function that returns a tensor", target)
    high, low = rows.amax(0), rows.amin(0)
    positive = max(float(high.max()), 0.0)
    largest = max(positive, -float(low.min()))
    thresholds = [largest]
    if largest > _LEAST:
        steps = num or max(100, int(positive / 0.5))
        thresholds = [largest - k * (largest - _LEAST) / steps for k in range(steps + 1)]
    scales, losses = [], []
    for threshold in thresholds:
        scale = torch.ones_like(high)
        if threshold:
            scale = torch.maximum(high, -low).div(threshold).clamp(min=1.0)
        codes, step = quantize_activation(rows / scale, bits=activation_bits)
        rounded = [rtn_quantize(one * scale, **options).dequantize() for one in weights]
        change = outputs(codes * step, rounded) - target
        scales.append(scale)
        losses.append(change.square().sum(-1).mean())
    found = torch.stack(losses)
    best = smallest(name, found)
    return SmoothResult(scales[best], thresholds[best], float(found[best]), found)
