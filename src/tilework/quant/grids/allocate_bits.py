"""Bits for each layer, so that their average keeps to a budget."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.quant._arguments import computed, is_integer

__all__ = ["allocate_bits", "size_aware_score"]

_PAPER = implements(
    "BitsFusion: 1.99 bits Weight Quantization of Diffusion Model", year=2024, arxiv="2406.04333"
)


def _check_positive(name: str, argument: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or is_integer(tensor)):
        raise _checks.bad_type(name, argument, "an integer or floating-point tensor", tensor)
    if _checks.holds_values(tensor) and not ((tensor > 0) & tensor.isfinite()).all():
        raise ValueError(f"{name}: {argument} must be finite and above 0 everywhere")


@_PAPER
@torch.no_grad()
def size_aware_score(error: Tensor, size: Tensor | int | float, *, eta: float = 0.3) -> Tensor:
    r"""Errors of layers with a discount for large ones.

    .. math::

        \texttt{error} \cdot \texttt{size}^{-\eta}

    Args:
        error: Errors, of any shape.
        size: Numbers of weights above 0, which broadcast against ``error``.
        eta: The exponent :math:`\eta`.

    Returns:
        Scores, float64 for float64 errors and float32 otherwise.

    Raises:
        ValueError: ``size`` does not broadcast against ``error`` or is not above 0 and finite, or
            ``eta`` is not finite; tensors are looked at on the CPU alone.
        TypeError: ``error`` is not of a real floating dtype, ``size`` not of numbers, or ``eta`` no
            number.

    Example:
        >>> import torch
        >>> from tilework.quant import size_aware_score
        >>> size_aware_score(torch.tensor([2.0, 2.0]), torch.tensor([1, 100]), eta=0.5)
        tensor([2.0000, 0.2000])

    Reference:
        Yang Sui, Yanyu Li, Anil Kag, Yerlan Idelbayev, Junli Cao, Ju Hu, Dhritiman Sagar, Bo Yuan,
        Sergey Tulyakov, Jian Ren. BitsFusion: 1.99 bits Weight Quantization of Diffusion Model.
        2024. arXiv:2406.04333.
    """
    name = "size_aware_score"
    _checks.floating(name, "error", error)
    _checks.finite(name, "eta", eta)
    dtype = computed(error)
    if isinstance(size, Tensor):
        _check_positive(name, "size", size)
        pairs = zip(reversed(size.shape), reversed(error.shape), strict=False)
        if any(one != other and 1 not in (one, other) for one, other in pairs):
            accepted = f"broadcastable against shape {tuple(error.shape)}"
            raise _checks.bad_value(name, "size", accepted, size)
    else:
        _checks.positive(name, "size", size)
        size = torch.full((), _checks.plain(size), dtype=dtype, device=error.device)
    return error.to(dtype) * size.to(dtype) ** -float(eta)


@_PAPER
@torch.no_grad()
def allocate_bits(
    scores: Tensor,
    sizes: Tensor,
    *,
    candidates: Sequence[int] = (1, 2, 3),
    budget: int | float = 1.99,
) -> tuple[Tensor, float]:
    r"""Bits of layers by one threshold for the scores of all.

    For a threshold :math:`\tau`, layer :math:`i` of :math:`N_i` weights has the least candidate
    whose score is at most :math:`\tau`, or the largest candidate where there is none. Of
    :math:`b` bits, which are :math:`2^b + 1` levels as of :func:`balanced_quantize`, the average is

    .. math::

        \frac{\sum_i N_i \log_2(2^{b_i} + 1)}{\sum_i N_i}

    and the smallest of the scores with which it is at most ``budget`` is the threshold.

    Args:
        scores: Scores as of :func:`size_aware_score`, of shape (layers, candidates).
        sizes: The numbers of weights :math:`N`, of shape (layers,).
        candidates: Bits in ascending order, each at least 1.
        budget: The largest average.

    Returns:
        The bits of each layer, int64 of shape (layers,), and their average.

    Raises:
        ValueError: The average is above ``budget`` even with the least candidate everywhere; a
            tensor is of another shape, empty or not finite; ``sizes`` are not above 0;
            ``candidates`` are not ascending from at least 1; or ``budget`` is not above 0.
        TypeError: ``scores`` is not of a real floating dtype, ``sizes`` not of numbers, or an
            option of another type.

    Example:
        >>> import torch
        >>> from tilework.quant import allocate_bits
        >>> scores = torch.tensor([[0.9, 0.2, 0.1], [0.3, 0.2, 0.1]])
        >>> allocate_bits(scores, torch.tensor([100, 100]), budget=2.0)
        (tensor([2, 1]), 1.9534452978042591)

    Reference:
        As :func:`size_aware_score`.
    """
    name = "allocate_bits"
    _checks.positive(name, "budget", budget)
    if isinstance(candidates, str) or not isinstance(candidates, Sequence):
        raise _checks.bad_type(name, "candidates", "a sequence of ints", candidates)
    bits = [_checks.integer(name, "candidates", one) for one in candidates]
    if not bits or bits[0] < 1 or any(low >= high for low, high in pairwise(bits)):
        raise _checks.bad_value(name, "candidates", "ascending from at least 1", candidates)
    _checks.floating(name, "scores", scores)
    if scores.dim() != 2 or not len(scores) or scores.shape[1] != len(bits):
        accepted = f"of shape (layers, {len(bits)}) with a layer at least"
        raise _checks.bad_value(name, "scores", accepted, scores)
    if not scores.isfinite().all():
        raise ValueError(f"{name}: scores must be finite everywhere")
    _check_positive(name, "sizes", sizes)
    _checks.shape(name, "sizes", sizes, scores.shape[:1])

    # Fractions, so that rounding does not put an average above a budget that it is equal to.
    weights = [Fraction(size) for size in sizes.tolist()]
    costs = [Fraction(math.log2(2**one + 1)) for one in bits]
    rows = scores.tolist()

    def chosen(threshold: float) -> list[int]:
        last = len(bits) - 1
        return [
            next((place for place, score in enumerate(row) if score <= threshold), last)
            for row in rows
        ]

    def average(threshold: float) -> Fraction:
        pairs = zip(weights, chosen(threshold), strict=True)
        return sum((size * costs[place] for size, place in pairs), Fraction(0)) / sum(weights)

    thresholds = sorted({score for row in rows for score in row})
    # The average falls as the threshold rises.
    place = bisect_left(thresholds, True, key=lambda one: average(one) <= budget)
    if place == len(thresholds):
        accepted = f"at least {float(costs[0])}, the average of the least candidate"
        raise _checks.bad_value(name, "budget", accepted, budget)
    threshold = thresholds[place]
    result = torch.tensor([bits[one] for one in chosen(threshold)], device=scores.device)
    return result, float(average(threshold))
