"""Weights and Hessians to round, and the sweep by explicit elimination."""

from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[[int, Tensor], Tensor]
"""What stands for a column, from its position and all weights as they are then."""


def drawn(rows: int = 6, columns: int = 23) -> tuple[Tensor, Tensor]:
    """Weights, and the Hessian of correlated inputs, in float64."""
    weight = torch.randn(rows, columns, dtype=torch.float64)
    mix = torch.randn(columns, columns, dtype=torch.float64)
    inputs = torch.randn(3 * columns, columns, dtype=torch.float64) @ mix
    return weight, inputs.T @ inputs


def damped(hessian: Tensor, damp: float) -> Tensor:
    """By the page: the mean is over all columns, those without input are 1."""
    result = hessian.clone()
    mean = sum(hessian[j, j].item() for j in range(len(hessian))) / len(hessian)
    for j in range(len(hessian)):
        result[j, j] = hessian[j, j] + damp * mean if hessian[j, j] != 0 else 1.0
    return result


def eliminated(weight: Tensor, hessian: Tensor, rule: Rule) -> None:
    """The sweep with the inverse itself, of which rounded columns are eliminated one by one."""
    weight, inverse = weight.clone(), torch.linalg.inv(hessian)
    for j in range(weight.shape[1]):
        error = (weight[:, j] - rule(j, weight)) / inverse[j, j]
        weight[:, j + 1 :] -= torch.outer(error, inverse[j, j + 1 :])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
