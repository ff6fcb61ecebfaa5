"""The arguments of the operators of a linear head."""

import math
from typing import NamedTuple

from torch import Tensor


class LinearStats(NamedTuple):
    """Hidden states of shape (N, D), a head of shape (V, D), and targets of shape (N).

    The logits are the head's outputs, capped, then divided by the temperature. Small gradients of
    logits may be left out, as ``gradient_filter`` says.
    """

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None
    class_weight: Tensor | None
    softcap: float | None
    temperature: float
    ignore_index: int
    squares: bool
    moments: bool
    gradient_filter: float | None
    implementation: str


class LinearSum(NamedTuple):
    """The same, and a formula whose losses are added up; for which of the head to take gradients.

    These are ``input``, ``linear_weight`` and ``linear_bias``.
    """

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None
    class_weight: Tensor | None
    weight: Tensor
    target_weight: Tensor
    formula: str
    numbers: list[float]
    softcap: float | None
    ignore_index: int
    needed: list[bool]


def product_operations(*sizes: int) -> int:
    """Those of the logits, for tokens, features, classes; as many give a factor's gradient."""
    return 2 * math.prod(sizes)


def operations(given: LinearStats | LinearSum) -> int:
    """Those of the logits."""
    return product_operations(*given.input.shape, given.linear_weight.shape[0])


class Sum(NamedTuple):
    """The summed loss, and its gradients; an empty tensor for each that is not needed."""

    loss: Tensor
    of_input: Tensor
    of_weight: Tensor
    of_bias: Tensor
