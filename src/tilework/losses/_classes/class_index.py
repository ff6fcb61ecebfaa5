"""The class-index layout that losses share: what they check, how they ignore and reduce.

Classes lie in dimension 0 of a 1-D ``input``, otherwise in dimension 1; ``target`` has the shape of
what is left, the positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype, is_autocast


class Positions(NamedTuple):
    """Checked tensors, with which the formula of a loss is safe at every position."""

    logits: Tensor
    """In float32 or better; 0 at ignored positions, nan where the target is no class."""
    target: Tensor
    """A class at every position."""
    kept: Tensor
    class_weight: Tensor | None
    """Of a shape that broadcasts against the logits."""
    weights: Tensor
    """The class weight of each position's target, 0 where ignored; a mean divides by their sum."""
    dtype: torch.dtype
    """What the loss is returned in."""

    @property
    def dim(self) -> int:
        """The dimension of the classes."""
        return class_dim(self.logits)

    def at_target(self, values: Tensor) -> Tensor:
        """The entry of each position's target, from a tensor of the logits' shape."""
        return values.gather(self.dim, self.target.unsqueeze(self.dim)).squeeze(self.dim)

    def nll(self) -> Tensor:
        """The negative log-likelihood of each position's target."""
        return -self.at_target(self.logits.log_softmax(self.dim))

    def reduce(self, losses: Tensor, reduction: str) -> Tensor:
        """Reduce the losses of the kept positions."""
        losses = losses.where(self.kept, 0)
        if reduction == "sum":
            losses = losses.sum()
        elif reduction == "mean":
            losses = losses.sum() / self.weights.sum()
        return losses.to(self.dtype)


def check_options(function: str, ignore_index: int, reduction: str) -> None:
    """Refuse what no loss takes for these options."""
    _checks.integer(function, "ignore_index", ignore_index)
    _checks.one_of(function, "reduction", reduction, _checks.REDUCTIONS)


def class_dim(input: Tensor) -> int:
    """The dimension of the classes."""
    return min(input.dim() - 1, 1)


def check_input(function: str, argument: str, input: Tensor, classes: int = 1) -> None:
    """Refuse what has no dimension of that many classes at least."""
    _checks.floating(function, argument, input)
    if input.dim() == 0 or input.shape[class_dim(input)] < classes:
        accepted = f"of shape (C), (N, C) or (N, C, d1, ...), C >= {classes}"
        raise _checks.bad_value(function, argument, accepted, input)


def positions(
    function: str,
    input: Tensor,
    target: Tensor | None,
    ignore_index: int,
    *,
    weight: Tensor | None = None,
    min_classes: int = 1,
) -> Positions:
    """Check the tensors of a loss and make its formula safe.

    Without a target every position is kept, with the same weight.
    """
    check_input(function, "input", input, min_classes)
    dim = class_dim(input)
    classes = input.shape[dim]
    shape = (*input.shape[:dim], *input.shape[dim + 1 :])
    if weight is not None:
        _checks.constant(function, "weight", weight, (classes,))
    dtype = computation_dtype(input.dtype)
    logits = input.to(dtype)
    class_weight = None
    if weight is not None:
        class_weight = weight.to(dtype).reshape(-1, *[1] * (input.dim() - dim - 1))
    if target is None:
        target = torch.zeros(shape, dtype=torch.int64, device=input.device)
        kept = torch.ones_like(target, dtype=torch.bool)
        return Positions(logits, target, kept, class_weight, kept.to(dtype), result_dtype(input))

    check_target(function, "target", target, shape)
    _checks.same_device(function, input=input, target=target, weight=weight)
    kept = target != ignore_index
    known = kept & inside(function, target, ignore_index, classes)
    filling = torch.zeros_like(kept, dtype=dtype).masked_fill(kept, torch.nan)
    logits = logits.where(known.unsqueeze(dim), filling.unsqueeze(dim))
    target = target.where(known, 0)
    weights = kept.to(dtype) if weight is None else weight.to(dtype)[target].where(kept, 0)
    return Positions(logits, target, kept, class_weight, weights, result_dtype(input))


def check_target(
    function: str,
    argument: str,
    target: Tensor,
    shape: tuple[int, ...],
    *,
    soft: tuple[int, ...] | None = None,
) -> None:
    """Refuse what is not one class index for each position, or floating of shape ``soft``."""
    is_soft = soft is not None and isinstance(target, Tensor) and target.is_floating_point()
    other = "" if soft is None else f", or floating-point of shape {soft}"
    if not isinstance(target, Tensor) or not (is_soft or target.dtype == torch.int64):
        raise _checks.bad_type(function, argument, f"int64 of shape {shape}{other}", target)
    if tuple(target.shape) != (soft if is_soft else shape):
        kind = "" if soft is None else "int64 "
        raise _checks.bad_value(function, argument, f"{kind}of shape {shape}{other}", target)


def is_kept(target: Tensor, ignore_index: int) -> Tensor:
    """Where a target counts."""
    return _differs(target, ignore_index)


def is_class(target: Tensor, classes: int) -> Tensor:
    """Where a target is a class."""
    if not torch.compiler.is_compiling():
        return (target >= 0) & (target < classes)
    return ~_differs(target, target.clamp(0, classes - 1))


def _differs(target: Tensor, other: Tensor | int) -> Tensor:
    """Where a target is not the other number."""
    if not torch.compiler.is_compiling():
        return target != other
    # What is over four times smaller than what it is made of is not made again in the backward
    # pass, and a mask that is stored for it keeps inductor from fusing the loops over classes. So
    # it comes from int32.
    return (target ^ other).sign().to(torch.int32) != 0


def inside(function: str, target: Tensor, ignore_index: int, classes: int) -> Tensor:
    """Where a target is a class; refuse kept ones that are not, if looking is free."""
    result = is_class(target, classes)
    kept = is_kept(target, ignore_index)
    if _checks.holds_values(target) and not bool((result | ~kept).all()):
        raise IndexError(
            f"{function}: target must lie in [0, {classes}) or be ignore_index={ignore_index}, "
            f"got {int(target[kept & ~result][0])}"
        )
    return result


def result_dtype(input: Tensor) -> torch.dtype:
    """The dtype of a loss: its input's, and as torch's losses under autocast, float32 for half."""
    lowered = is_autocast(input.device.type)
    return computation_dtype(input.dtype) if lowered else input.dtype
