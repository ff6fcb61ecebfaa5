"""What losses over classes are formulas of: a few numbers of each position's logits.

A formula is written once, under the name of its loss. Logits that exist give its numbers
(``logits``), and so does a linear head whose logits are never stored (``linear``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilework import _torch
from tilework._operators import computation_dtype


class Statistics(NamedTuple):
    """Statistics of the logits ``z`` of each position: a total of 1 and 0 elsewhere where ignored.

    The last four are empty where they were not asked for.
    """

    shift: Tensor
    """The largest logit; a constant."""
    total: Tensor
    """``sum(exp(z - shift))``"""
    target_gap: Tensor
    """``shift - z[target]``, nan where the target is no class."""
    class_gap: Tensor
    """``sum(class_weight * (shift - z))``, 0 without class weights."""
    squares: Tensor
    """``sum(z**2)`` over all classes but the target."""
    moment: Tensor
    """``sum(exp(z - shift) * (shift - z))``, to which classes of a logit of -inf add 0."""
    top: Tensor
    """The largest output, before a softcap; a constant."""
    argmax: Tensor
    """The first class that has it."""

    @property
    def nll(self) -> Tensor:
        """The negative log-likelihood of each position's target."""
        return self.target_gap + self.total.log()

    @property
    def lse(self) -> Tensor:
        """The log-sum-exp of each position's logits."""
        return self.shift + self.total.log()


CONSTANT = ("shift", "top", "argmax")
_OF_MOMENTS = ("moment", "top", "argmax")


def is_wanted(name: str, squares: bool, moments: bool) -> bool:
    """Whether a statistic was asked for."""
    return moments if name in _OF_MOMENTS else squares if name == "squares" else True


def empty(input: Tensor, target: Tensor, squares: bool, moments: bool) -> Statistics:
    """Room for the statistics of logits made of such an input."""
    dtype = computation_dtype(input.dtype)
    return Statistics(
        **{
            name: input.new_empty(
                target.shape if is_wanted(name, squares, moments) else 0,
                dtype=target.dtype if name == "argmax" else dtype,
            )
            for name in Statistics._fields
        }
    )


def of_wanted(grads: Statistics, squares: bool, moments: bool) -> Statistics:
    """Gradients without those of empty statistics, which some callers give."""
    return Statistics(
        *(
            grad if is_wanted(name, squares, moments) else None
            for name, grad in grads._asdict().items()
        )  # type: ignore[arg-type]
    )


def masked(statistics: Statistics, kept: Tensor) -> Statistics:
    """A total of 1 and 0 elsewhere where positions are ignored; empty ones stay empty."""
    return Statistics(
        **{
            name: values.where(kept, 1 if name == "total" else 0) if values.numel() else values
            for name, values in statistics._asdict().items()
        }
    )


class Rows(NamedTuple):
    """What else a formula knows of the positions."""

    weight: Tensor
    """1 or the weight of a position, 0 where ignored, nan where the target is no class."""
    target_weight: Tensor
    """The same times the class weight of its target; a mean divides by their sum."""
    classes: int
    spread: Tensor | None
    """The sum of the weights of ``class_gap``, where there are such."""

    @classmethod
    def of(
        cls, weight: Tensor, target_weight: Tensor, classes: int, class_weight: Tensor | None
    ) -> "Rows":
        """With the sum of the weights of ``class_gap``."""
        spread = None if class_weight is None else class_weight.sum()
        return cls(weight, target_weight, classes, spread)

    def at(self, place: Any) -> "Rows":
        """Those of some positions."""
        return self._replace(weight=self.weight[place], target_weight=self.target_weight[place])


Function = Callable[..., Tensor]
"""Of statistics, rows and the formula's numbers; the loss of each position."""


@dataclass(frozen=True)
class Formula:
    """A loss, and which statistics it needs beside the first three."""

    function: Function
    squares: bool = False
    moments: bool = False

    def gradients(
        self, statistics: Statistics, rows: Rows, numbers: Sequence[float]
    ) -> tuple[Tensor, Statistics]:
        """The loss of each position, and the gradients of the statistics for their sum."""
        used = ["total", "target_gap"]
        used += ["class_gap"] if rows.spread is not None else []
        used += ["squares"] if self.squares else []
        used += ["moment"] if self.moments else []
        with _torch.autograd_enabled():
            leaves = [getattr(statistics, name).detach().requires_grad_() for name in used]
            given = statistics._replace(**dict(zip(used, leaves, strict=True)))
            losses = self.function(given, rows, *numbers)
            grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        found = dict(zip(used, grads, strict=True))
        return losses.detach(), Statistics(*(found.get(name) for name in Statistics._fields))  # type: ignore[arg-type]


FORMULAS: dict[str, Formula] = {}


def formula(
    name: str, *, squares: bool = False, moments: bool = False
) -> Callable[[Function], Function]:
    """Make a function the formula of the loss of this name.

    It must be proportional to the weights of :class:`Rows`, as a mean divides these, and a function
    of the logits' differences and log-sum-exp alone: the shift is a constant to the gradient, so
    that gaps come with the logarithm of the total, as in ``nll`` and ``lse``.
    """

    def register(function: Function) -> Function:
        FORMULAS[name] = Formula(function, squares, moments)
        return function

    return register
