"""Two heads whose classes are spread over processes, each of which has the same ones of both.

A process computes sums over its own classes, which one gather brings together. The divergence
"jsd" needs them for its second pass, and a second gather for the sums of that. The gradient of a
process's own share of the student's head needs no communication, that of the hidden states one sum.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tilework._operators import without_autocast
from tilework.losses._classes import sharding as of_classes
from tilework.losses._classes.sharding import Layout, VocabShard
from tilework.losses.linear_kl_div import operators
from tilework.losses.linear_kl_div.common import Divergences, Heads, divergence_and_statistics

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


def divergences(shard: VocabShard | None, given: Heads) -> Tensor:
    """The divergence of each row, over the classes of all processes."""
    if shard is None:
        return operators.divergences(given).value
    student_input = of_classes.sum_gradient(given.student_input, shard.group)
    given = given._replace(student_input=student_input)
    result: Tensor = _Divergences.apply(shard, *given)  # type: ignore[no-untyped-call]
    return result


def _room(given: Heads) -> Any:
    return import_module(f"{__package__}.{given.implementation}")


class _Divergences(torch.autograd.Function):
    """The divergences, and the gradients by this process's classes alone."""

    @staticmethod
    def forward(ctx: Any, shard: VocabShard, *arguments: Any) -> Tensor:
        given = Heads(*arguments)
        room = _room(given)

        def gather(sums: Tensor) -> Tensor:
            return of_classes.gather(sums, shard)

        results = without_autocast(divergence_and_statistics)(
            given, room.sums, room.mixture_sums, gather
        )
        ctx.save_for_backward(
            *(value if isinstance(value, Tensor) else None for value in given), results.statistics
        )
        ctx.options = [None if isinstance(value, Tensor) else value for value in given]
        return results.value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, statistics = ctx.saved_tensors
        given = Heads(
            *(
                option if tensor is None else tensor
                for tensor, option in zip(tensors, ctx.options, strict=True)
            )
        )
        _, *needs = ctx.needs_input_grad
        names = zip(Heads._fields, needs, strict=True)
        needed = frozenset(name for name, need in names if need)
        results, grads = Divergences(grad_value, statistics), Divergences(grad_value, statistics)
        found = without_autocast(_room(given).backward)(given, results, grads, needed)
        return None, *(found[name] if name in needed else None for name in Heads._fields)
