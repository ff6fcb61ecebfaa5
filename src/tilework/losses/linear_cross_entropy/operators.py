"""The operators of a linear head and how they differentiate."""

from typing import Any

import torch
from torch import Tensor

from tilework import _checks, _operators
from tilework._operators import computation_dtype
from tilework.losses.linear_cross_entropy import chunked, reference, tiled
from tilework.losses.linear_cross_entropy.head import IMPLEMENTATIONS
from tilework.losses.linear_cross_entropy.shared import Statistics


def logit_stats(*args: Any) -> Statistics:
    """See ``reference.linear_logit_stats``; the implementation comes last."""
    *arguments, implementation = args
    if implementation == "reference" or _operators.only_reference():
        return reference.linear_logit_stats(*arguments)
    statistics: Statistics = _logit_stats(*arguments, _recomputing(implementation, arguments[0]))
    return statistics


def position_losses(
    statistics: Statistics,
    class_weight: Tensor | None,
    target_scale: Tensor,
    class_scale: Tensor | None,
    square_scale: Tensor | None,
) -> Tensor:
    """``target_scale * (lse - z[target]) + class_scale * sum(class_weight * (lse - z)) +
    square_scale * lse**2`` of each row."""
    shift, total, target_gap, class_gap, *_ = statistics
    log_sum = total.log()
    losses = target_scale * (target_gap + log_sum)
    if class_weight is not None and class_scale is not None:
        losses = losses + class_scale * (class_gap + class_weight.sum() * log_sum)
    if square_scale is not None:
        losses = losses + square_scale * (shift + log_sum).square()
    return losses


def takes_gradients_early(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> bool:
    """Whether gradients can be taken before the loss is differentiated, and will be wanted.

    Not those of float16, which must be scaled before they are rounded.
    """
    heads = (input, linear_weight, linear_bias)
    return (
        torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in heads)
        and input.dtype != torch.float16
        and not torch._C._are_functorch_transforms_active()
        and not _operators.only_reference()
    )


def summed_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, *args: Any
) -> Tensor:
    """The sum of :func:`position_losses`, whose gradients are computed at once, chunk by chunk."""
    heads = (input, linear_weight, linear_bias)
    needed = [tensor is not None and tensor.requires_grad for tensor in heads]
    loss: Tensor = _summed_loss(*heads[:2], target, linear_bias, *args, needed)[0]
    return loss


def _recomputing(implementation: str, input: Tensor) -> str:
    """The implementation that computes statistics; chunks are of use for summed losses only."""
    if implementation != "chunked":
        return implementation
    return "triton" if _has_kernels(input) else "tiled"


def _has_kernels(input: Tensor) -> bool:
    return _operators.choose("", IMPLEMENTATIONS, None, input) == "triton"


def _kernels(implementation: str) -> Any:
    """The module of an implementation; that of Triton is imported on its first use."""
    if implementation == "triton":
        from tilework.losses.linear_cross_entropy import triton

        return triton
    return tiled


def _forward(*args: Any) -> Statistics:
    *arguments, implementation = args
    statistics: Statistics = _kernels(implementation).forward(*arguments)
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
    results: tuple[Tensor, Tensor, Tensor] = _kernels(implementation).backward(*arguments)
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


_logit_stats = _operators.define(
    "linear_logit_stats(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, "
    "Tensor? class_weight, float? softcap, float temperature, int ignore_index, bool moments, "
    "float? gradient_filter, str implementation) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_save,
    backward=_differentiate,
)
_logit_stats_backward = _operators.define(
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


def _sum_forward(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient_ = chunked.logit_gradient_
    if _has_kernels(input):
        gradient_ = _kernels("triton").logit_gradient_
    results: tuple[Tensor, Tensor, Tensor, Tensor]
    results = chunked.loss_and_gradients(gradient_, input, *args)
    return results


def _sum_fake(input: Tensor, linear_weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    loss = input.new_empty((), dtype=computation_dtype(input.dtype))
    return loss, *empty_gradients(input, linear_weight, args[-1])


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, softcap, ignore_index, needed = inputs
    ctx.options = softcap, ignore_index, needed
    ctx.gradients = output[1:]
    ctx.mark_non_differentiable(*ctx.gradients)
    ctx.save_for_backward(*tensors)


def _differentiate_sum(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Hand the gradients over, once: a second call computes them again."""
    wanted = [ctx.needs_input_grad[index] for index in (0, 1, 3)]
    if torch.is_grad_enabled():
        gradients = _differentiable_gradients(ctx, grad_loss, wanted)
    else:
        taken, ctx.gradients = ctx.gradients, None
        if taken is None:
            taken = _summed_loss(*ctx.saved_tensors, *ctx.options)[1:]
        gradients = [_scaled(gradient, grad_loss) for gradient in taken]
    grad_input, grad_weight, grad_bias = (
        gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)
    )
    return grad_input, grad_weight, None, grad_bias, *[None] * 7


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """The gradient times a number, in place where it is ours alone."""
    if type(scale) is not Tensor:
        return (gradient * scale).to(gradient.dtype)  # traced: the compiler sees to the memory
    if _checks.holds_values(scale) and scale.item() == 1:
        return gradient
    return gradient.mul_(scale)


def _differentiable_gradients(
    ctx: Any, grad_loss: Tensor, wanted: list[bool]
) -> list[Tensor | None]:
    """Gradients with a graph of their own, from statistics."""
    input, linear_weight, target, linear_bias, class_weight, *scales = ctx.saved_tensors
    softcap, ignore_index, _ = ctx.options
    statistics = logit_stats(
        input,
        linear_weight,
        target,
        linear_bias,
        class_weight,
        softcap,
        1.0,
        ignore_index,
        False,
        None,
        "chunked",
    )
    loss = position_losses(statistics, class_weight, *scales).sum()
    heads = (input, linear_weight, linear_bias)
    differentiated = [head for head, want in zip(heads, wanted, strict=True) if want]
    results = iter(torch.autograd.grad(loss, differentiated, grad_loss, create_graph=True))
    return [next(results) if want else None for want in wanted]


_summed_loss = _operators.define(
    "linear_summed_loss(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, "
    "Tensor? class_weight, Tensor target_scale, Tensor? class_scale, Tensor? square_scale, "
    "float? softcap, int ignore_index, bool[3] needed) -> (Tensor, Tensor, Tensor, Tensor)",
    _sum_forward,
    _sum_fake,
    setup_context=_save_sum,
    backward=_differentiate_sum,
)
