"""The operators of a linear head's statistics and how they differentiate."""

from typing import Any

import torch
from torch import Tensor

from tilework import _implementations, _operators
from tilework._operators import computation_dtype
from tilework.losses._classes.head import IMPLEMENTATIONS
from tilework.losses._classes.linear import reference, tiled
from tilework.losses._classes.tiles import Statistics


def logit_stats(*args: Any) -> Statistics:
    """See ``reference.linear_logit_stats``; the implementation comes last."""
    *arguments, implementation = args
    if implementation == "reference" or _operators.only_reference():
        return reference.linear_logit_stats(*arguments)
    statistics: Statistics = _logit_stats(*arguments, _recomputing(implementation, arguments[0]))
    return statistics


def _recomputing(implementation: str, input: Tensor) -> str:
    """The implementation that computes statistics; chunks are of use for summed losses only."""
    return _preferred(input) if implementation == "chunked" else implementation


def has_kernels(input: Tensor) -> bool:
    return _preferred(input) == "triton"


def _preferred(input: Tensor) -> str:
    return _implementations.choose("linear_logit_stats", IMPLEMENTATIONS, None, input)


def kernels(implementation: str) -> Any:
    """The module of an implementation; that of Triton is imported on its first use."""
    if implementation == "triton":
        from tilework.losses._classes.linear import triton

        return triton
    return tiled


def _forward(*args: Any) -> Statistics:
    *arguments, implementation = args
    statistics: Statistics = kernels(implementation).forward(*arguments)
    return statistics


def _forward_fake(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    moments = args[-3]
    dtype = computation_dtype(input.dtype)
    tokens = input.shape[0]
    extra = tokens if moments else 0
    return (
        *(input.new_empty(tokens, dtype=dtype) for _ in range(4)),
        *(input.new_empty(extra, dtype=dtype) for _ in range(2)),
        input.new_empty(extra, dtype=torch.int64),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Statistics) -> None:
    *tensors, softcap, temperature, ignore_index, ctx.moments, gradient_filter, _ = inputs
    ctx.options = softcap, temperature, ignore_index, gradient_filter
    ctx.implementation = inputs[-1]
    shift, _, _, _, moment, top, argmax = output
    ctx.mark_non_differentiable(shift, top, argmax, *(() if ctx.moments else (moment,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, shift, output[1].detach())


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    input_grad, weight_grad, _target, bias_grad = ctx.needs_input_grad[:4]
    needed = [input_grad, weight_grad, bias_grad]
    shift = ctx.saved_tensors[-2]
    total, target_gap, class_gap = (
        torch.zeros_like(shift) if grad is None else grad for grad in grads[1:4]
    )
    results = _logit_stats_backward(
        total,
        target_gap,
        class_gap,
        grads[4] if ctx.moments else None,
        *ctx.saved_tensors,
        *ctx.options,
        needed,
        ctx.implementation,
    )
    grad_input, grad_weight, grad_bias = (
        result if need else None for result, need in zip(results, needed, strict=True)
    )
    return grad_input, grad_weight, None, grad_bias, *[None] * 7


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, implementation = args
    results: tuple[Tensor, Tensor, Tensor] = kernels(implementation).backward(*arguments)
    return results


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    input, linear_weight = args[4:6]
    return empty_gradients(input, linear_weight, args[-2])


def empty_gradients(
    input: Tensor, linear_weight: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a head for fake kernels; an empty tensor for each that is not needed."""
    sizes = input.shape, linear_weight.shape, linear_weight.shape[:1]
    grad_input, grad_weight, grad_bias = (
        input.new_empty(size if need else 0) for size, need in zip(sizes, needed, strict=True)
    )
    return grad_input, grad_weight, grad_bias


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _shift, _total, softcap, temperature, ignore_index, _filter, ctx.needed, _ = inputs
    ctx.options = softcap, temperature, ignore_index
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative is that of the reference's first."""
    *upstream, input, linear_weight, target, linear_bias, class_weight = ctx.saved_tensors
    moments = upstream[3] is not None
    upstream = upstream[: 3 + moments]
    heads = [input, linear_weight] if linear_bias is None else [input, linear_weight, linear_bias]
    needed = [need for need, _ in zip(ctx.needed, heads, strict=False)]

    def statistics(input: Tensor, linear_weight: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        return reference.linear_logit_stats(
            input,
            linear_weight,
            target,
            bias[0] if bias else None,
            class_weight,
            *ctx.options,
            moments,
            None,
        )[1 : 1 + len(upstream)]

    grad_upstream, grad_heads = _operators.second_derivative(
        statistics,
        upstream,
        heads,
        needed,
        [grad for grad, need in zip(grads, ctx.needed, strict=True) if need],
    )
    grad_bias = grad_heads[2] if linear_bias is not None else None
    return (
        *grad_upstream,
        *(() if moments else (None,)),
        *grad_heads[:2],
        None,
        grad_bias,
        *[None] * 9,
    )


_logit_stats = _operators.define_by_position(
    "linear_logit_stats(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, "
    "Tensor? class_weight, float? softcap, float temperature, int ignore_index, bool moments, "
    "float? gradient_filter, str implementation) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_save,
    backward=_differentiate,
)
_logit_stats_backward = _operators.define_by_position(
    "linear_logit_stats_backward(Tensor grad_total, Tensor grad_target_gap, "
    "Tensor grad_class_gap, Tensor? grad_moment, Tensor input, Tensor linear_weight, "
    "Tensor target, Tensor? linear_bias, Tensor? class_weight, Tensor shift, Tensor total, "
    "float? softcap, float temperature, int ignore_index, float? gradient_filter, bool[3] needed, "
    "str implementation) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    setup_context=_save_backward,
    backward=_differentiate_backward,
)
