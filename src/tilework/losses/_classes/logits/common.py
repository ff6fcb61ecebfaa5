"""The arguments of the operators of logits."""

from typing import NamedTuple

from torch import Tensor


class LogitStats(NamedTuple):
    """Logits of shape (N, C) or (N, C, S), and targets of shape (N) or (N, S)."""

    input: Tensor
    target: Tensor
    class_weight: Tensor | None
    ignore_index: int
    squares: bool
    moments: bool
    implementation: str


class SummedLoss(NamedTuple):
    """The same, and a formula whose losses are added up."""

    input: Tensor
    target: Tensor
    class_weight: Tensor | None
    weight: Tensor
    target_weight: Tensor
    formula: str
    numbers: list[float]
    ignore_index: int
    implementation: str


class Sum(NamedTuple):
    """The summed loss, and its gradient with respect to the logits, in their dtype."""

    loss: Tensor
    gradient: Tensor
