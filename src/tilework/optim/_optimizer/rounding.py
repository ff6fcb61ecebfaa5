"""How a parameter takes its new value: rounded to nearest, at random, or with compensation."""

from typing import Any

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_INCREMENTS = 0x9E3779B9, 0xBB67AE85

Word = Any
"""32 bits of a counter: an int, or an int64 tensor that holds nothing above them."""


def _multiply(factor: int, word: Word) -> tuple[Word, Word]:
    product = factor * word  # of tensors modulo 2^64, whose upper half is right for all that
    return (product >> 32) & _WORD, product & _WORD


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> Word:
    """The first word that Philox4x32-10 makes of a counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _INCREMENTS[0]) & _WORD, (k1 + _INCREMENTS[1]) & _WORD
    return c0


def stochastic(value: Tensor, index: Tensor, step: Word, position: Word, seed: Any) -> Tensor:
    """Round float32 to bfloat16, up with the probability that keeps the mean.

    The random number of an element is a function of its ``index`` in the parameter, the ``step``,
    the parameter's ``position`` in the optimizer and the ``seed``, whatever computes it.
    """
    counter = index & _WORD, index >> 32, step, position
    low = philox(counter, (seed & _WORD, seed >> 32)) & 0xFFFF
    bits = (value.view(torch.int32) + low.to(torch.int32)) & -0x10000
    return bits.view(torch.float32).where(value.isfinite(), value).bfloat16()


def compensated(old: Tensor, new: Tensor, compensation: Tensor) -> tuple[Tensor, Tensor]:
    """Kahan's sum of bfloat16 ``old`` and a change: what is stored, and what that lacks."""
    change = (new - old) + compensation
    stored = (old + change).bfloat16()
    return stored, change - (stored.float() - old)
