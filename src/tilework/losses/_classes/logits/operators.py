"""The operators of logits and how they differentiate."""

from torch import Tensor

from tilework import _operators
from tilework._operators import Gradients, Needed
from tilework.losses._classes import early
from tilework.losses._classes.logits import reference, tiled
from tilework.losses._classes.logits.common import LogitStats, Sum, SummedLoss
from tilework.losses._classes.statistics import CONSTANT, FORMULAS, Rows, Statistics, empty

logit_stats = _operators.define_pair(
    "logit_stats",
    LogitStats,
    Statistics,
    lambda given: empty(given.input, given.target, given.squares, given.moments),
    reference=reference.forward,
    rooms=__package__,
    differentiable=("input",),
    saved=("input", "target", "class_weight", "shift", "total"),
    constant=CONSTANT,
)


def loss(given: SummedLoss) -> Tensor:
    """The summed loss, by way of the statistics."""
    formula = FORMULAS[given.formula]
    statistics = logit_stats(
        LogitStats(
            given.input,
            given.target,
            given.class_weight,
            given.ignore_index,
            formula.squares,
            formula.moments,
            given.implementation,
        )
    )
    rows = Rows.of(given.weight, given.target_weight, given.input.shape[1], given.class_weight)
    losses = formula.function(statistics, rows, *given.numbers)
    return losses.where(given.target != given.ignore_index, 0).sum()


def _differentiate(given: SummedLoss, results: Sum, grads: Sum, needed: Needed) -> Gradients:
    return early.hand_over(
        grads.loss,
        {"input": results.gradient},
        {"input": given.input},
        lambda: loss(given),
        needed,
    )


summed_loss = _operators.define(
    "logit_summed_loss",
    SummedLoss,
    Sum,
    tiled.loss_and_gradient,
    lambda given: Sum(given.weight.new_empty(()), given.input.new_empty(given.input.shape)),
    derivative=_differentiate,
    saved=("gradient", "input", "target", "class_weight", "weight", "target_weight"),
    constant=("gradient",),
)
