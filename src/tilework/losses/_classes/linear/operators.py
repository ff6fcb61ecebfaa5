"""The operators of a linear head and how they differentiate."""

from torch import Tensor

from tilework import _implementations, _operators
from tilework._operators import Gradients, Needed, computation_dtype
from tilework.losses._classes import early
from tilework.losses._classes.linear import IMPLEMENTATIONS, chunked, reference
from tilework.losses._classes.linear.common import LinearStats, LinearSum, Sum, operations
from tilework.losses._classes.statistics import CONSTANT, FORMULAS, Rows, Statistics, empty

HEAD = ("input", "linear_weight", "linear_bias")


def logit_stats(given: LinearStats) -> Statistics:
    """The statistics; chunks are of use for summed losses only."""
    if given.implementation == "chunked":
        given = given._replace(implementation="triton" if has_kernels(given.input) else "tiled")
    return _logit_stats(given)


def has_kernels(input: Tensor) -> bool:
    """Whether the kernels take such tensors here."""
    return _implementations.defaults(IMPLEMENTATIONS, input)[0] == "triton"


_logit_stats = _operators.define_pair(
    "linear_logit_stats",
    LinearStats,
    Statistics,
    lambda given: empty(given.input, given.target, given.squares, given.moments),
    reference=reference.forward,
    rooms=__package__,
    differentiable=HEAD,
    saved=(*HEAD, "target", "class_weight", "shift", "total"),
    constant=CONSTANT,
    operations=operations,
    backward_operations=lambda given, needed: (
        sum(name in needed for name in HEAD[:2]) * operations(given)
    ),
)


def loss(given: LinearSum) -> Tensor:
    """The summed loss, by way of the statistics."""
    formula = FORMULAS[given.formula]
    statistics = logit_stats(
        LinearStats(
            *given[:5],
            given.softcap,
            1.0,
            given.ignore_index,
            formula.squares,
            formula.moments,
            None,
            "chunked",
        )
    )
    rows = Rows.of(
        given.weight, given.target_weight, given.linear_weight.shape[0], given.class_weight
    )
    losses = formula.function(statistics, rows, *given.numbers)
    return losses.where(given.target != given.ignore_index, 0).sum()


def _forward(given: LinearSum) -> Sum:
    gradient_ = chunked.logit_gradient_
    if has_kernels(given.input):
        from tilework.losses._classes.logits import triton

        gradient_ = triton.logit_gradient_
    return chunked.loss_and_gradients(gradient_, given)


def _fake(given: LinearSum) -> Sum:
    head = given.input, given.linear_weight, given.linear_bias
    return Sum(
        given.input.new_empty((), dtype=computation_dtype(given.input.dtype)),
        *(
            given.input.new_empty(tensor.shape if need and tensor is not None else 0)
            for tensor, need in zip(head, given.needed, strict=True)
        ),
    )


def _differentiate(given: LinearSum, results: Sum, grads: Sum, needed: Needed) -> Gradients:
    return early.hand_over(
        grads.loss,
        dict(zip(HEAD, results[1:], strict=True)),
        {name: getattr(given, name) for name in HEAD},
        lambda: loss(given),
        needed,
    )


def _summed_operations(given: LinearSum) -> int:
    return (1 + sum(given.needed[:2])) * operations(given)


_GRADIENTS = Sum._fields[1:]
summed_loss = _operators.define(
    "linear_summed_loss",
    LinearSum,
    Sum,
    _forward,
    _fake,
    derivative=_differentiate,
    saved=(*_GRADIENTS, *HEAD, "target", "class_weight", "weight", "target_weight"),
    constant=_GRADIENTS,
    operations=_summed_operations,
)
