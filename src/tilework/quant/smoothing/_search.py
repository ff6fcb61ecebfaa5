"""The search among candidates for weights whose outputs differ least."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tilework import _checks

Weights = Sequence[Tensor]
Forward = Callable[[list[Tensor]], Tensor]


def reduced(rows: Tensor) -> Tensor:
    """At most as many rows as columns, whose products with any vector have the same length."""
    count, columns = rows.shape[-2:]
    return torch.linalg.qr(rows, mode="r").R if count > columns else rows


def output_error(
    name: str, rows: Tensor, weights: Weights, forward: Forward | None
) -> Callable[[Weights], Tensor]:
    """The mean square of what other weights change in the outputs of layers with the same input."""
    if forward is None:
        few = reduced(rows)
        count = len(rows) * sum(map(len, weights))

        def error(changed: Weights) -> Tensor:
            pairs = zip(changed, weights, strict=True)
            squares = [(few @ (new - old).mT).square().sum() for new, old in pairs]
            return torch.stack(squares).sum() / count

        return error
    target = forward(list(weights))
    if not isinstance(target, Tensor):
        raise _checks.bad_type(name, "forward", "a function that returns a tensor", target)
    return lambda changed: (forward(list(changed)) - target).square().mean()


def smallest(name: str, errors: Tensor) -> int:
    """The first of the smallest errors."""
    values = errors.tolist()
    if not errors.isfinite().all():
        raise ValueError(f"{name}: input must have finite outputs, got an error of {max(values)}")
    return min(range(len(values)), key=values.__getitem__)
