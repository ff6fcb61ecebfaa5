"""The positions of a loss over classes: checked, flattened, with what each of them counts.

``of_logits`` and ``of_head`` prepare them from the two sources of statistics. A loss is then a
:class:`Formula` of these, or whatever else it makes of the statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework import _checks, _implementations
from tilework._implementations import Table
from tilework._operators import computation_dtype
from tilework.losses._classes import class_index, early, head, sharding
from tilework.losses._classes import linear as of_linear
from tilework.losses._classes import logits as of_existing
from tilework.losses._classes.linear import operators as linear_operators
from tilework.losses._classes.linear.common import LinearStats, LinearSum
from tilework.losses._classes.logits import operators as logit_operators
from tilework.losses._classes.logits.common import LogitStats, SummedLoss
from tilework.losses._classes.sharding import Layout, VocabShard
from tilework.losses._classes.statistics import FORMULAS, Rows, Statistics

P = TypeVar("P", bound="Positions")  # beartype, which tests run under, refuses Self in methods
_NEVER = -1  # every target is a class by then


@dataclass(frozen=True)
class Positions:
    """What a loss needs of its positions, wherever their logits come from."""

    input: Tensor
    """Logits of shape (N, C) or (N, C, S), or hidden states of shape (N, D)."""
    target: Tensor
    """A class at every position, or ``ignore_index``; of shape (N) or (N, S)."""
    ignore_index: int
    classes: int
    class_weight: Tensor | None
    weight: Tensor
    """1 or the weight of each position, 0 where ignored, nan where the target is no class."""
    target_weight: Tensor
    """The same times the class weight of its target; a mean divides by their sum."""
    shape: tuple[int, ...]
    """That of the losses, if they are not reduced."""
    dtype: torch.dtype
    """That of the loss."""
    implementation: str

    @property
    def kept(self) -> Tensor:
        """Which positions count."""
        return class_index.is_kept(self.target, self.ignore_index)

    @property
    def spread(self) -> Tensor:
        """The class weights of ``class_gap`` where a part of the target is spread over classes."""
        if self.class_weight is not None:
            return self.class_weight
        return self.weight.new_ones(1).expand(self.classes)

    def statistics(
        self, class_weight: Tensor | None = None, *, squares: bool = False, moments: bool = False
    ) -> Statistics:
        """Statistics of the logits."""
        raise NotImplementedError

    def takes_gradients_early(self) -> bool:
        """Whether a sum of losses takes its gradients in the forward pass."""
        raise NotImplementedError

    def early_sum(
        self,
        class_weight: Tensor | None,
        weight: Tensor,
        target_weight: Tensor,
        formula: str,
        numbers: Sequence[float],
    ) -> Tensor:
        """A sum of losses that does so."""
        raise NotImplementedError

    def counting(self: "P", counts: Tensor) -> "P":
        """The same without the positions that do not count."""
        return replace(
            self,
            target=self.target.where(counts, self.ignore_index),
            weight=self.weight.where(counts, 0),
            target_weight=self.target_weight.where(counts, 0),
        )

    def loss(
        self,
        formula: str,
        numbers: Sequence[float],
        reduction: str,
        *,
        spreads: bool = False,
        statistics: Statistics | None = None,
    ) -> Tensor:
        """The reduced loss of a formula, which reads ``class_gap`` if it ``spreads``.

        A caller that has the statistics may give them.
        """
        class_weight = self.spread if spreads else None
        if reduction == "none" or statistics is not None or not self.takes_gradients_early():
            loss = FORMULAS[formula]
            if statistics is None:
                statistics = self.statistics(
                    class_weight, squares=loss.squares, moments=loss.moments
                )
            rows = Rows.of(self.weight, self.target_weight, self.classes, class_weight)
            return self.reduce(loss.function(statistics, rows, *numbers), reduction)
        if reduction == "sum":
            total = self.early_sum(class_weight, self.weight, self.target_weight, formula, numbers)
            return total.to(self.dtype)
        # The weights are divided beforehand, as the gradients are taken at once.
        total = self.target_weight.sum()
        counted = total != 0
        share = 1 / total.where(counted, 1)
        weights = self.weight * share, self.target_weight * share
        mean = self.early_sum(class_weight, *weights, formula, numbers)
        return mean.where(counted, torch.nan).to(self.dtype)

    def reduce(self, losses: Tensor, reduction: str) -> Tensor:
        """Reduce the losses of the kept positions."""
        losses = losses.where(self.kept, 0)
        if reduction == "none":
            return self.restored(losses).to(self.dtype)
        total = self.add_up(losses.sum())
        return (total if reduction == "sum" else total / self.total_weight).to(self.dtype)

    @property
    def total_weight(self) -> Tensor:
        """What a mean divides by."""
        return self.add_up(self.target_weight.sum())

    def add_up(self, value: Tensor) -> Tensor:
        """The sum over all positions of what this process has."""
        return value

    def restored(self, losses: Tensor) -> Tensor:
        """Losses of positions as the caller gets them."""
        return losses.reshape(self.shape)


@dataclass(frozen=True)
class OfLogits(Positions):
    """Positions of logits that exist."""

    def statistics(
        self, class_weight: Tensor | None = None, *, squares: bool = False, moments: bool = False
    ) -> Statistics:
        """Statistics of the logits."""
        return logit_operators.logit_stats(
            LogitStats(
                self.input,
                self.target,
                class_weight,
                self.ignore_index,
                squares,
                moments,
                self.implementation,
            )
        )

    def takes_gradients_early(self) -> bool:
        """Whether a sum of losses takes its gradients in the forward pass."""
        return self.implementation == "tiled" and early.is_possible(self.input)

    def early_sum(
        self,
        class_weight: Tensor | None,
        weight: Tensor,
        target_weight: Tensor,
        formula: str,
        numbers: Sequence[float],
    ) -> Tensor:
        """A sum of losses that does so."""
        given = SummedLoss(
            self.input,
            self.target,
            class_weight,
            weight,
            target_weight,
            formula,
            list(numbers),
            self.ignore_index,
            self.implementation,
        )
        return logit_operators.summed_loss(given).loss


@dataclass(frozen=True)
class OfHead(Positions):
    """Positions of a linear head, whose logits are not stored."""

    linear_weight: Tensor
    linear_bias: Tensor | None
    softcap: float | None
    gradient_filter: float | None
    layout: Layout
    padded_shape: tuple[int, ...]
    """The shape of the positions, of which the last ones may have no target."""

    def statistics(
        self,
        class_weight: Tensor | None = None,
        *,
        squares: bool = False,
        moments: bool = False,
        temperature: float = 1.0,
    ) -> Statistics:
        """Statistics of the logits divided by a temperature."""
        given = LinearStats(
            self.input,
            self.linear_weight,
            self.target,
            self.linear_bias,
            class_weight,
            self.softcap,
            temperature,
            self.ignore_index,
            squares,
            moments,
            self.gradient_filter,
            self.implementation,
        )
        return sharding.logit_stats(self.layout.shard, given)

    def takes_gradients_early(self) -> bool:
        """Whether a sum of losses takes its gradients in the forward pass."""
        heads = self.input, self.linear_weight, self.linear_bias
        return (
            self.implementation == "chunked"
            and _is_whole(self.layout, self.gradient_filter)
            and early.is_possible(*heads)
        )

    def early_sum(
        self,
        class_weight: Tensor | None,
        weight: Tensor,
        target_weight: Tensor,
        formula: str,
        numbers: Sequence[float],
    ) -> Tensor:
        """A sum of losses that does so."""
        heads = self.input, self.linear_weight, self.linear_bias
        given = LinearSum(
            *heads[:2],
            self.target,
            self.linear_bias,
            class_weight,
            weight,
            target_weight,
            formula,
            list(numbers),
            self.softcap,
            self.ignore_index,
            [tensor is not None and tensor.requires_grad for tensor in heads],
        )
        return linear_operators.summed_loss(given).loss

    def add_up(self, value: Tensor) -> Tensor:
        """The sum over all positions of what this process has."""
        return self.layout.add_up(value)

    def restored(self, losses: Tensor) -> Tensor:
        """Losses of positions as the caller gets them."""
        losses = losses.reshape(self.padded_shape)
        if self.shape != self.padded_shape:
            losses = losses[..., : self.shape[-1]]
        return self.layout.of_tokens(losses)

    def detached(self) -> "OfHead":
        """The same without gradients."""
        bias = None if self.linear_bias is None else self.linear_bias.detach()
        weight = self.linear_weight.detach()
        return replace(self, input=self.input.detach(), linear_weight=weight, linear_bias=bias)

    def everywhere(self) -> "OfHead":
        """The same without ignored positions: 0 is the class of those that have none."""
        return replace(self, target=self.target.where(self.weight == 1, 0), ignore_index=_NEVER)


def of_logits(
    function: str,
    input: Tensor,
    target: Tensor | None,
    ignore_index: int,
    *,
    weight: Tensor | None = None,
    min_classes: int = 1,
) -> OfLogits:
    """Check the tensors of a loss. Without a target every position is kept."""
    class_index.check_input(function, "input", input, min_classes)
    dim = class_index.class_dim(input)
    classes = input.shape[dim]
    shape = (*input.shape[:dim], *input.shape[dim + 1 :])
    if weight is not None:
        _checks.constant(function, "weight", weight, (classes,))
    if target is None:
        target = torch.zeros(shape, dtype=torch.int64, device=input.device)
        ignore_index = _NEVER
    class_index.check_target(function, "target", target, shape)
    _checks.same_device(function, input=input, target=target, weight=weight)
    dtype = class_index.result_dtype(input)
    if input.dim() == 1:
        input, target = input[None], target[None]
    elif input.dim() > 3:
        input, target = input.flatten(2), target.flatten(1)
    table = of_existing.IMPLEMENTATIONS
    return OfLogits(
        input,
        *_counted(function, target, ignore_index, classes, weight, None, input.dtype),
        shape,
        dtype,
        _implementations.choose(function, table, None, input),
    )


def of_head(
    function: str,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None,
    linear_bias: Tensor | None,
    ignore_index: int,
    implementation: str | None,
    *,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    softcap: float | None = None,
    shift: int = 0,
    gradient_filter: float | None = None,
    vocab_parallel: VocabShard | None = None,
    min_classes: int = 1,
    is_sum: bool = True,
    table: Table = of_linear.IMPLEMENTATIONS,
) -> OfHead:
    """Check the tensors of a linear form. Without a target every position is kept.

    ``is_sum`` tells whether a sum or mean of a formula is wanted, whose gradients may be taken
    early.
    """
    _checks.count(function, "shift", shift, 0)
    if target is None and isinstance(input, Tensor) and not _checks.is_distributed(input):
        target = torch.zeros(input.shape[:-1], dtype=torch.int64, device=input.device)
        ignore_index = _NEVER
    layout, (input, linear_weight, linear_bias, target, token_weight) = sharding.localize(
        function,
        vocab_parallel,
        input,
        linear_weight,
        linear_bias,
        target=target,
        token_weight=token_weight,
    )
    input, linear_weight, linear_bias = head.cast_under_autocast(input, linear_weight, linear_bias)
    head.check(function, input, linear_weight, linear_bias)
    classes = layout.classes(linear_weight)
    if classes < min_classes:
        accepted = f"of at least {min_classes} classes"
        raise _checks.bad_value(function, "linear_weight", accepted, linear_weight)
    if target is None:
        target = torch.zeros(input.shape[:-1], dtype=torch.int64, device=input.device)
        ignore_index = _NEVER
    class_index.check_target(function, "target", target, tuple(input.shape[:-1]))
    if _checks.is_distributed(weight):
        accepted = "a plain tensor, the same on all processes"
        raise _checks.bad_type(function, "weight", accepted, weight)
    for name, constant, size in (
        ("weight", weight, (classes,)),
        ("token_weight", token_weight, input.shape[:-1]),
    ):
        if constant is not None:
            _checks.constant(function, name, constant, size)
    if shift and (input.dim() < 3 or shift >= input.shape[-2] or layout.splits_sequences):
        raise ValueError(
            f"{function}: shift above 0 must come with input of shape (..., B, T, D), whole "
            f"sequences, and be below T, got shift={shift} and input {_checks.describe(input)}"
        )
    _checks.same_device(
        function,
        input=input,
        linear_weight=linear_weight,
        target=target,
        linear_bias=linear_bias,
        weight=weight,
        token_weight=token_weight,
    )
    chosen = _implementations.choose(
        function,
        table,
        implementation,
        input,
        linear_weight=linear_weight,
        linear_bias=linear_bias,
        is_sum=is_sum and _is_whole(layout, gradient_filter),
    )
    padded_shape = shape = tuple(target.shape)
    if shift:
        shape = (*shape[:-1], shape[-1] - shift)
        # Positions without a target are ignored, so that the input needs no copy.
        target = F.pad(target[..., shift:], (0, shift), value=ignore_index)
        if token_weight is not None:
            token_weight = F.pad(token_weight[..., shift:], (0, shift))
    flat = input.reshape(-1, input.shape[-1])
    if token_weight is not None:
        token_weight = token_weight.reshape(-1)
    return OfHead(
        flat,
        *_counted(
            function, target.reshape(-1), ignore_index, classes, weight, token_weight, flat.dtype
        ),
        shape,
        computation_dtype(flat.dtype),
        chosen,
        linear_weight,
        linear_bias,
        softcap,
        gradient_filter,
        layout,
        padded_shape,
    )


def _is_whole(layout: Layout, gradient_filter: float | None) -> bool:
    """Whether one process has all there is, and wants all of the gradient."""
    return layout == Layout() and gradient_filter is None


def _counted(
    function: str,
    target: Tensor,
    ignore_index: int,
    classes: int,
    weight: Tensor | None,
    token_weight: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, int, int, Tensor | None, Tensor, Tensor]:
    """From the target to the weights, what positions have in common."""
    inside = class_index.inside(function, target, ignore_index, classes)
    kept = class_index.is_kept(target, ignore_index)
    dtype = computation_dtype(dtype)
    # Outside the classes, a kept target makes its own position nan, in value and gradient.
    of_position = kept.to(dtype).where(inside | ~kept, torch.nan)
    if token_weight is not None:
        kept = kept & (token_weight != 0)
        of_position = (of_position * token_weight).where(kept, 0).to(dtype)
        target = target.where(kept, ignore_index)
    class_weight = None if weight is None else weight.to(dtype)
    of_target = of_position
    if class_weight is not None:
        of_target = (of_position * class_weight[target.where(inside & kept, 0)]).where(kept, 0)
    return target, ignore_index, classes, class_weight, of_position, of_target
