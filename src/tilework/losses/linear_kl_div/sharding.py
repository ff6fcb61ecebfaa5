"""Two heads whose classes are spread over processes, each of which has the same ones of both.

A process computes sums over its own classes, which one gather brings together. The divergence
"jsd" needs them for its second pass, and a second gather for the sums of that. The gradient of a
process's own share of the student's head needs no communication, that of the hidden states one sum.
"""

from typing import Any

import torch
from torch import Tensor

from tilework._operators import without_autocast
from tilework.losses._classes import sharding as of_classes
from tilework.losses._classes.sharding import Layout, VocabShard
from tilework.losses.linear_kl_div import operators

_HeadTensors = tuple[Tensor, Tensor, Tensor | None]


def localize(
    function: str,
    vocab_parallel: VocabShard | None,
    student: _HeadTensors,
    teacher: _HeadTensors,
    mask: Tensor | None,
    token_weight: Tensor | None,
) -> tuple[Layout, _HeadTensors, _HeadTensors, Tensor | None, Tensor | None]:
    """The layout of the arguments, and what this process has of each."""
    layout, tensors = of_classes.localize(
        function,
        vocab_parallel,
        *student,
        prefix="student_",
        mask=mask,
        token_weight=token_weight,
    )
    theirs, teacher_tensors = of_classes.localize(
        function, vocab_parallel, *teacher, prefix="teacher_"
    )
    if theirs.shard != layout.shard:
        raise ValueError(
            f"{function}: teacher_weight must give each process the classes of student_weight, "
            f"got {_classes(theirs)} and {_classes(layout)}"
        )
    if theirs.tokens != layout.tokens:
        raise ValueError(f"{function}: teacher_input must be placed as student_input")
    student_input, student_weight, student_bias, mask, token_weight = tensors
    teacher_input, teacher_weight, teacher_bias = teacher_tensors
    return (
        layout,
        (student_input, student_weight, student_bias),
        (teacher_input, teacher_weight, teacher_bias),
        mask,
        token_weight,
    )


def _classes(layout: Layout) -> str:
    shard = layout.shard
    return "all" if shard is None else f"{shard.start} to {shard.stop} of {shard.classes}"


def divergences(shard: VocabShard | None, student_input: Tensor, *args: Any) -> Tensor:
    """``operators.divergences`` over the classes of all processes."""
    if shard is None:
        return operators.divergences(student_input, *args)
    student_input = of_classes.sum_gradient(student_input, shard.group)
    result: Tensor = _Divergences.apply(student_input, shard, *args)  # type: ignore[no-untyped-call]
    return result


class _Divergences(torch.autograd.Function):
    """The divergences, and the gradients by this process's classes alone."""

    @staticmethod
    def forward(ctx: Any, student_input: Tensor, shard: VocabShard, *args: Any) -> Tensor:
        def gather(sums: Tensor) -> Tensor:
            return of_classes.gather(sums, shard)

        arguments = (student_input, *args)
        result, statistics = without_autocast(operators.divergence_and_statistics)(
            *arguments, gather=gather
        )
        ctx.save_for_backward(*arguments[:7], statistics)
        ctx.options, ctx.implementation = arguments[7:-1], arguments[-1]
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_divergence: Tensor) -> tuple[Tensor | None, ...]:
        needed = [ctx.needs_input_grad[index] for index in (0, 2, 3)]
        grad_input, *grads = operators.gradients(ctx, grad_divergence, needed)
        return grad_input, None, *grads, *[None] * 10
