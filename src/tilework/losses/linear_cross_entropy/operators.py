"""The operator of a summed loss, whose gradients are taken early, and how it differentiates."""

from typing import Any

import torch
from torch import Tensor

from tilework import _checks, _operators, _torch
from tilework._operators import computation_dtype
from tilework.losses._classes.linear.operators import (
    empty_gradients,
    has_kernels,
    kernels,
    logit_stats,
)
from tilework.losses._classes.tiles import Statistics
from tilework.losses.linear_cross_entropy import chunked


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
        and not _torch.transforms_are_active()
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


def _sum_forward(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient_ = chunked.logit_gradient_
    if has_kernels(input):
        gradient_ = kernels("triton").logit_gradient_
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


_summed_loss = _operators.define_by_position(
    "linear_summed_loss(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, "
    "Tensor? class_weight, Tensor target_scale, Tensor? class_scale, Tensor? square_scale, "
    "float? softcap, int ignore_index, bool[3] needed) -> (Tensor, Tensor, Tensor, Tensor)",
    _sum_forward,
    _sum_fake,
    setup_context=_save_sum,
    backward=_differentiate_sum,
)
