"""What the linear forms of losses share: a checked head, and statistics of its logits.

They are losses of a few numbers for each position, of which the logits are not stored.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tilework import _checks, _implementations
from tilework._operators import computation_dtype
from tilework.losses._classes import class_index, head
from tilework.losses._classes.linear import operators

_NEVER = -1  # every target is a class by then


class Statistics(NamedTuple):
    """Statistics of the logits of each position: a total of 1 and 0 elsewhere where ignored."""

    shift: Tensor
    """The largest logit; a constant."""
    total: Tensor
    """The sum of the exponentials of logits less the shift."""
    target_gap: Tensor
    """The shift less the target's logit, nan where the target is no class."""

    @property
    def nll(self) -> Tensor:
        """The negative log-likelihood of each position's target."""
        return self.target_gap + self.total.log()

    @property
    def lse(self) -> Tensor:
        """The log-sum-exp of each position's logits."""
        return self.shift + self.total.log()


class LinearPositions(NamedTuple):
    """Checked tensors of a head, whose positions lie in one dimension."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None
    ignore_index: int
    implementation: str
    weights: Tensor
    """The class weight of each position's target, 0 where ignored, nan where the target is no
    class; a mean divides by their sum."""
    shape: torch.Size

    @property
    def kept(self) -> Tensor:
        """Which positions count."""
        return self.target != self.ignore_index

    def detached(self) -> "LinearPositions":
        """The same without gradients."""
        bias = None if self.linear_bias is None else self.linear_bias.detach()
        input, linear_weight = self.input.detach(), self.linear_weight.detach()
        return self._replace(input=input, linear_weight=linear_weight, linear_bias=bias)

    def statistics(self, temperature: float = 1.0) -> Statistics:
        """Statistics of the logits divided by a temperature."""
        arguments = (*self[:4], None, None, temperature, self.ignore_index, False, None)
        return Statistics(*operators.logit_stats(*arguments, self.implementation)[:3])

    def reduce(self, losses: Tensor, reduction: str) -> Tensor:
        """Reduce the losses of the kept positions."""
        losses = losses.where(self.kept, 0)
        if reduction == "none":
            return losses.reshape(self.shape)
        return losses.sum() if reduction == "sum" else losses.sum() / self.weights.sum()


def linear_positions(
    function: str,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    linear_bias: Tensor | None,
    ignore_index: int,
    implementation: str | None,
    *,
    weight: Tensor | None = None,
    min_classes: int = 1,
) -> LinearPositions:
    """Check the tensors of a linear form. Without a target every position is kept."""
    input, linear_weight, linear_bias = head.cast_under_autocast(input, linear_weight, linear_bias)
    head.check(function, input, linear_weight, linear_bias)
    shape, classes = input.shape[:-1], linear_weight.shape[0]
    if classes < min_classes:
        accepted = f"of at least {min_classes} classes"
        raise _checks.bad_value(function, "linear_weight", accepted, linear_weight)
    if target is None:
        target = torch.zeros(shape, dtype=torch.int64, device=input.device)
        ignore_index = _NEVER
    class_index.check_target(function, "target", target, tuple(shape))
    if weight is not None:
        _checks.constant(function, "weight", weight, (classes,))
    _checks.same_device(
        function,
        input=input,
        linear_weight=linear_weight,
        target=target,
        linear_bias=linear_bias,
        weight=weight,
    )
    chosen = _implementations.choose(function, head.IMPLEMENTATIONS, implementation, input)

    input, target = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    inside = class_index.inside(function, target, ignore_index, classes)
    dtype = computation_dtype(input.dtype)
    kept = target != ignore_index
    weights = kept.to(dtype)
    if weight is not None:
        weights = weight.to(dtype)[target.where(inside, 0)].where(kept, 0)
    # Also of losses that do not look at the target.
    weights = weights.where(inside | ~kept, torch.nan)
    return LinearPositions(
        input, linear_weight, target, linear_bias, ignore_index, chosen, weights, shape
    )
