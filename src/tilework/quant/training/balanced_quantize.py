"""An odd number of levels about 0, with a step that is fitted, then learned."""

import torch
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.quant._arguments import check_bits, check_weight, computed
from tilework.quant.training.lsq_quantize import learned

__all__ = ["balanced_quantize", "balanced_scale_init"]

_PAPER = implements(
    "BitsFusion: 1.99 bits Weight Quantization of Diffusion Model", year=2024, arxiv="2406.04333"
)


@_PAPER
def balanced_quantize(
    weight: Tensor, scale: Tensor | float, *, bits: int, gradient_scale: float | None = None
) -> Tensor:
    r"""The nearest of :math:`2^b + 1` levels about 0, with a step that is learned.

    It is :func:`lsq_quantize` with the multiples of ``scale`` from :math:`-2^{b - 1}` to
    :math:`2^{b - 1}`, for ``bits`` :math:`b`; a code takes :math:`\log_2(2^b + 1)` bits.

    Args:
        weight: Weights, of any shape.
        scale: A number above 0, or a tensor of such that broadcasts against ``weight``, as of
            :func:`balanced_scale_init`.
        bits: From 1 to 8.
        gradient_scale: Factor of the gradient of ``scale``; by default as of
            :func:`lsq_quantize`.

    Returns:
        Levels of the shape and dtype of ``weight``, computed in float32 at least.

    Raises:
        ValueError: ``scale`` does not broadcast to the shape of ``weight`` or is a number that is
            not above 0, or an option is not one of those above.
        TypeError: A tensor is not of a real floating dtype, or an option of another type.

    Example:
        >>> import torch
        >>> from tilework.quant import balanced_quantize
        >>> balanced_quantize(torch.tensor([-3.0, -0.2, 0.4, 0.8]), 0.5, bits=1)
        tensor([-0.5000, -0.0000,  0.5000,  0.5000])

    Reference:
        Yang Sui, Yanyu Li, Anil Kag, Yerlan Idelbayev, Junli Cao, Ju Hu, Dhritiman Sagar, Bo Yuan,
        Sergey Tulyakov, Jian Ren. BitsFusion: 1.99 bits Weight Quantization of Diffusion Model.
        2024. arXiv:2406.04333.
    """
    name = "balanced_quantize"
    most = 2 ** (check_bits(name, bits) - 1)
    return learned(name, weight, scale, -most, most, gradient_scale, "weight")


@_PAPER
@torch.no_grad()
def balanced_scale_init(
    weight: Tensor, *, bits: int, iterations: int = 10, axis: str = "out"
) -> Tensor:
    r"""Steps for :func:`balanced_quantize`, by turns of rounding and least squares.

    It starts with :math:`s = \max \lvert w \rvert / 2^{b - 1}`, or 1 where that is 0; then
    ``iterations`` times

    .. math::

        q = \min(\max(\mathrm{round}(w / s), -2^{b - 1}), 2^{b - 1}), \qquad
        s \leftarrow \frac{\langle w, q \rangle}{\langle q, q \rangle}

    unless all :math:`q` are 0. The error :math:`\lVert w - s q \rVert` never rises.

    Args:
        weight: Weights, of shape (out, in).
        bits: From 1 to 8.
        iterations: At least 0.
        axis: ``"out"``, a step for each row, or ``"tensor"``, one for all.

    Returns:
        Steps of shape (out, 1) or (1, 1), float64 for float64 weights and float32 otherwise.

    Raises:
        ValueError: ``weight`` is not a finite non-empty matrix, or an option is not one of those
            above.
        TypeError: ``weight`` is not of a real floating dtype, or an option of another type.

    Example:
        >>> import torch
        >>> from tilework.quant import balanced_scale_init
        >>> balanced_scale_init(torch.tensor([[1.5, -1.5, 0.5, 2.0], [0.0, 0.0, 0.0, 0.0]]), bits=1)
        tensor([[1.6667],
                [1.0000]])

    Reference:
        As :func:`balanced_quantize`.
    """
    name = "balanced_scale_init"
    check_weight(name, weight)
    most = 2 ** (check_bits(name, bits) - 1)
    _checks.count(name, "iterations", iterations, 0)
    _checks.one_of(name, "axis", axis, ("out", "tensor"))
    dims = (1,) if axis == "out" else (0, 1)
    values = weight.to(computed(weight))
    scale: Tensor = values.abs().amax(dims, keepdim=True) / most
    scale = scale.masked_fill(scale == 0, 1.0)
    for _ in range(iterations):
        whole = (values / scale).round().clamp(-most, most)
        squares = whole.square().sum(dims, keepdim=True)
        scale = ((values * whole).sum(dims, keepdim=True) / squares).where(squares != 0, scale)
    return scale
