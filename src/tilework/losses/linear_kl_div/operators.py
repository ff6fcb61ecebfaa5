"""The operator of the divergence between two linear heads and how it differentiates."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tilework import _operators
from tilework._operators import computation_dtype
from tilework.losses.linear_kl_div import common, reference, tiled


def divergences(*args: Any) -> Tensor:
    """See ``reference.linear_divergences``; the implementation comes last."""
    *arguments, implementation = args
    if implementation == "reference" or _operators.only_reference():
        return reference.linear_divergences(*arguments)
    result: Tensor = _divergences(*args)[0]
    return result


def divergence_and_statistics(
    *args: Any, gather: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """See ``common.divergence_and_statistics``; the arguments are those of :func:`divergences`."""
    *tensors, counted, student_softcap, teacher_softcap, temperature, divergence, beta, name = args
    options = student_softcap, teacher_softcap, temperature
    return common.divergence_and_statistics(
        kernels(name), tuple(tensors), counted, options, divergence, beta, gather
    )


def kernels(implementation: str) -> Any:
    """The module of an implementation; that of Triton is imported on its first use."""
    if implementation == "triton":
        from tilework.losses.linear_kl_div import triton

        return triton
    return tiled


def _forward_fake(student_input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = computation_dtype(student_input.dtype)
    tokens = student_input.shape[0]
    divergences = student_input.new_empty(tokens, dtype=dtype)
    return divergences, divergences.new_empty((6, tokens))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options, ctx.implementation = inputs[:7], inputs[7:-1], inputs[-1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def gradients(ctx: Any, grad_divergence: Tensor, needed: list[bool]) -> list[Tensor | None]:
    """Those of the student's input, weight and bias; None for each that is not needed."""
    results = _divergences_backward(
        grad_divergence, *ctx.saved_tensors, *ctx.options, needed, ctx.implementation
    )
    return [result if need else None for result, need in zip(results, needed, strict=True)]


def _differentiate(ctx: Any, grad_divergence: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *gradients(ctx, grad_divergence, list(ctx.needs_input_grad[:3])), *[None] * 10


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, implementation = args
    results: tuple[Tensor, Tensor, Tensor] = kernels(implementation).backward(*arguments)
    return results


def _backward_fake(
    grad_divergence: Tensor, student_input: Tensor, student_weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(student_input, student_weight, args[-2])


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options, ctx.needed = inputs[:8], inputs[9:-2], inputs[-2]
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative is that of the reference's first."""
    grad_divergence, student_input, student_weight, student_bias, *constants = ctx.saved_tensors
    student = [student_input, student_weight]
    if student_bias is not None:
        student.append(student_bias)

    def first_order(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor]:
        return (reference.linear_divergences(input, weight, bias, *constants, *ctx.options),)

    (grad_upstream,), (grad_input, grad_weight, *grad_bias) = _operators.second_derivative(
        first_order,
        [grad_divergence],
        student,
        [need for need, _ in zip(ctx.needed, student, strict=False)],
        [grad for grad, need in zip(grads, ctx.needed, strict=True) if need],
    )
    return grad_upstream, grad_input, grad_weight, grad_bias[0] if grad_bias else None, *[None] * 12


def empty_gradients(
    input: Tensor, linear_weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a head for fake kernels; an empty tensor for each that is not needed."""
    sizes = input.shape, linear_weight.shape, linear_weight.shape[:1]
    grad_input, grad_weight, grad_bias = (
        input.new_empty(size if need else 0) for size, need in zip(sizes, needed, strict=True)
    )
    return grad_input, grad_weight, grad_bias


_divergences = _operators.define_by_position(
    "linear_kl_div(Tensor student_input, Tensor student_weight, Tensor? student_bias, "
    "Tensor teacher_input, Tensor teacher_weight, Tensor? teacher_bias, Tensor counted, "
    "float? student_softcap, float? teacher_softcap, float temperature, str divergence, "
    "float beta, str implementation) -> (Tensor, Tensor)",
    divergence_and_statistics,
    _forward_fake,
    setup_context=_save,
    backward=_differentiate,
)
_divergences_backward = _operators.define_by_position(
    "linear_kl_div_backward(Tensor grad_divergence, Tensor student_input, Tensor student_weight, "
    "Tensor? student_bias, Tensor teacher_input, Tensor teacher_weight, Tensor? teacher_bias, "
    "Tensor counted, Tensor statistics, float? student_softcap, float? teacher_softcap, "
    "float temperature, str divergence, float beta, bool[3] needed, str implementation) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    setup_context=_save_backward,
    backward=_differentiate_backward,
)
