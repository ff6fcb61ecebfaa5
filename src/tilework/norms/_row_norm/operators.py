"""The operators of RMS and layer normalization, with their autograd."""

from typing import Any

import torch
from torch import Tensor

from tilework import _operators
from tilework._operators import computation_dtype
from tilework.norms._row_norm import reference, tiled


def _kernels(implementation: str) -> Any:
    """The module of an implementation; that of Triton is imported on its first use."""
    if implementation == "triton":
        from tilework.norms._row_norm import triton

        return triton
    return tiled


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *arguments, implementation = args
    results: tuple[Tensor, Tensor, Tensor, Tensor] = _kernels(implementation).forward(*arguments)
    return results


def _forward_fake(
    input: Tensor, residual: Tensor | None, weight: Any, bias: Any, dims: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, centered, _implementation = options
    leading, dtype = input.shape[:-dims], computation_dtype(input.dtype)
    return (
        input.new_empty(input.shape),
        input.new_empty(0 if residual is None else input.shape),
        input.new_empty(leading if centered else 0, dtype=dtype),
        input.new_empty(leading, dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, residual, weight, bias, *ctx.options = inputs
    _, total, mean, rstd = output
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (input, residual)]
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input if residual is None else total, weight, bias, mean, rstd)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_output, grad_total, *_ = grads
    need_input, need_residual, *need_parameters = ctx.needs_input_grad[:4]
    input_dtype, residual_dtype = ctx.dtypes
    results: list[Tensor | None]
    if grad_output is None:
        # Only the sum was used.
        results = [grad_total, None, None]
    else:
        dtype = input_dtype
        if residual_dtype is not None:
            dtype = torch.promote_types(input_dtype, residual_dtype)
        else:
            grad_total = None
        needed = [need_input or need_residual, *need_parameters]
        *options, implementation = ctx.options
        found = _row_norm_backward(
            grad_output, grad_total, *ctx.saved_tensors, *options, dtype, needed, implementation
        )
        results = [grad if need else None for grad, need in zip(found, needed, strict=True)]
    grad_sum, grad_weight, grad_bias = results
    grad_input = grad_sum.to(input_dtype) if need_input and grad_sum is not None else None
    grad_residual = grad_sum.to(residual_dtype) if need_residual and grad_sum is not None else None
    return grad_input, grad_residual, grad_weight, grad_bias, *[None] * len(ctx.options)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, implementation = args
    results: tuple[Tensor, Tensor, Tensor] = _kernels(implementation).backward(*arguments)
    return results


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    total, weight, bias = args[2:5]
    dtype, needed = args[-3:-1]
    return (
        total.new_empty(total.shape if needed[0] else 0, dtype=dtype),
        *(
            total.new_empty(0)
            if parameter is None or not need
            else parameter.new_empty(parameter.shape)
            for parameter, need in zip((weight, bias), needed[1:], strict=True)
        ),
    )


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _mean, _rstd = inputs[:7]
    *ctx.options, ctx.dtype, ctx.needed, _implementation = inputs[7:]
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The second derivative is that of the reference's first."""
    given = {
        name: tensor
        for name, tensor in zip(_DIFFERENTIABLE, ctx.saved_tensors, strict=True)
        if tensor is not None
    }

    def first_derivative(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(given, tensors, strict=True))
        grad_output, grad_total = named.pop("grad_output"), named.pop("grad_total", None)

        def norm(*leaves: Tensor) -> Tensor:
            leaf = dict(zip(named, leaves, strict=True))
            arguments = leaf["total"], None, leaf.get("weight"), leaf.get("bias")
            return reference.forward(*arguments, *ctx.options)[0]

        pulled = torch.func.vjp(norm, *named.values())[1](grad_output)
        results = dict(zip(named, pulled, strict=True))
        if grad_total is not None:
            results["total"] = results["total"] + grad_total
        wanted = zip(("total", "weight", "bias"), ctx.needed, strict=True)
        return tuple(results[name] for name, need in wanted if need)

    pull = torch.func.vjp(first_derivative, *given.values())[1]
    wanted = zip(grads, ctx.needed, strict=True)
    results = dict(zip(given, pull(tuple(grad for grad, need in wanted if need)), strict=True))
    return *(results.get(name) for name in _DIFFERENTIABLE), *[None] * 10


def _spread(*args: Any) -> Any:
    """The rule for distributed tensors, which is imported on its first use."""
    from tilework.norms._row_norm import sharding

    return sharding.forward(*args)


def _spread_backward(*args: Any) -> Any:
    from tilework.norms._row_norm import sharding

    return sharding.backward(*args)


_DIFFERENTIABLE = ("grad_output", "grad_total", "total", "weight", "bias")
_OPTIONS = "int dims, SymInt num_measured, float eps, float weight_offset, bool centered"
row_norm = _operators.define_by_position(
    "row_norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, "
    f"{_OPTIONS}, str implementation) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_save,
    backward=_differentiate,
    sharding=_spread,
)
_row_norm_backward = _operators.define_by_position(
    "row_norm_backward(Tensor grad_output, Tensor? grad_total, Tensor total, Tensor? weight, "
    f"Tensor? bias, Tensor mean, Tensor rstd, {_OPTIONS}, ScalarType dtype, bool[3] needed, "
    "str implementation) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    setup_context=_save_backward,
    backward=_differentiate_backward,
    sharding=_spread_backward,
)
