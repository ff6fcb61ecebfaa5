"""The sum of the squared logits of the wrong classes of a linear head, tile by tile."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework import _operators
from tilework._operators import computation_dtype, without_autocast
from tilework.losses._classes.linear.operators import empty_gradients
from tilework.losses._classes.tiles import Head, kept_rows, spread


def wrong_squares(*args: Any) -> Tensor:
    """The sum for each position, 0 where ignored; the implementation comes last.

    A target that is no class has no logit to leave out.
    """
    *arguments, implementation = args
    if implementation == "reference" or _operators.only_reference():
        return _reference(*arguments)
    result: Tensor = _wrong_squares(*arguments)
    return result


@without_autocast
def _reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int,
) -> Tensor:
    dtype = computation_dtype(input.dtype)
    kept = target != ignore_index
    hidden = input.to(dtype).where(kept[:, None], 0)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    logits = F.linear(hidden, linear_weight.to(dtype), bias)
    classes = torch.arange(logits.shape[1], device=logits.device)
    wrong = logits.where(classes != target[:, None], 0)
    return wrong.square().sum(1).where(kept, 0)


def _forward(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int,
) -> Tensor:
    rows, (hidden, kept_target) = kept_rows(target == ignore_index, input, target)
    head = Head(hidden, linear_weight, linear_bias, None, 1.0)
    result = hidden.new_zeros(len(hidden), dtype=head.dtype)
    for tokens in head.tokens():
        for classes in head.classes():
            result[tokens] += _wrong_logits(head, kept_target, tokens, classes).square_().sum(1)
    return spread(result, rows, len(input), dim=0).masked_fill(target == ignore_index, 0)


def _backward(
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; an empty tensor for each that is not needed."""
    ignored = target == ignore_index
    rows, (hidden, kept_target, scale) = kept_rows(ignored, input, target, grad[:, None])
    head = Head(hidden, linear_weight, linear_bias, None, 1.0)

    def gradient(tokens: slice, classes: slice) -> tuple[Tensor, None]:
        logits = _wrong_logits(head, kept_target, tokens, classes)
        return logits.mul_(2 * scale[tokens]), None

    grad_hidden, grad_weight, grad_bias = head.gradients(needed, gradient)
    if needed[0]:
        grad_hidden = spread(grad_hidden, rows, len(input), dim=0)
    return grad_hidden, grad_weight, grad_bias


def _wrong_logits(head: Head, target: Tensor, tokens: slice, classes: slice) -> Tensor:
    """A tile of logits in which those of the targets are 0."""
    logits = head.outputs(tokens, classes)
    column = torch.arange(classes.start, classes.stop, device=logits.device)
    return logits.masked_fill_(column == target[tokens, None], 0)


def _forward_fake(input: Tensor, *args: Any) -> Tensor:
    return input.new_empty(input.shape[0], dtype=computation_dtype(input.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ignore_index = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input_grad, weight_grad, _target, bias_grad, _ = ctx.needs_input_grad
    needed = [input_grad, weight_grad, bias_grad]
    results = _wrong_squares_backward(grad, *ctx.saved_tensors, ctx.ignore_index, needed)
    grad_input, grad_weight, grad_bias = (
        result if need else None for result, need in zip(results, needed, strict=True)
    )
    return grad_input, grad_weight, None, grad_bias, None


def _backward_fake(
    grad: Tensor, input: Tensor, linear_weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(input, linear_weight, args[-1])


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.ignore_index, ctx.needed = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative is that of the reference's first."""
    upstream, input, linear_weight, target, linear_bias = ctx.saved_tensors
    heads = [input, linear_weight] if linear_bias is None else [input, linear_weight, linear_bias]

    def squares(input: Tensor, linear_weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor]:
        return (_reference(input, linear_weight, target, bias, ctx.ignore_index),)

    (grad_upstream,), (grad_input, grad_weight, *grad_bias) = _operators.second_derivative(
        squares,
        [upstream],
        heads,
        [need for need, _ in zip(ctx.needed, heads, strict=False)],
        [grad for grad, need in zip(grads, ctx.needed, strict=True) if need],
    )
    bias_grad = grad_bias[0] if grad_bias else None
    return grad_upstream, grad_input, grad_weight, None, bias_grad, None, None


_wrong_squares = _operators.define_by_position(
    "linear_wrong_squares(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, "
    "int ignore_index) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_save,
    backward=_differentiate,
)
_wrong_squares_backward = _operators.define_by_position(
    "linear_wrong_squares_backward(Tensor grad, Tensor input, Tensor linear_weight, "
    "Tensor target, Tensor? linear_bias, int ignore_index, bool[3] needed) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    setup_context=_save_backward,
    backward=_differentiate_backward,
)
