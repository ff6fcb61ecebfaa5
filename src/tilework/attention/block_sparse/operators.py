"""The operators of block-sparse attention and how they differentiate."""

from typing import Any

import torch
from torch import Tensor

from tilework import _operators
from tilework.attention.block_sparse import reference, tiled
from tilework.attention.block_sparse.common import empty_gradient, empty_results


def attention(*args: Any) -> tuple[Tensor, Tensor]:
    """See ``reference.block_sparse_attention``; the implementation comes last."""
    *arguments, implementation = args
    if implementation == "reference" or _operators.only_reference():
        return reference.block_sparse_attention(*arguments)
    results: tuple[Tensor, Tensor] = _attention(*args)
    return results


def refusal(block_size: tuple[int, int], features: int, values: int) -> str | None:
    """Why the kernels do not take these sizes, if they do not."""
    reason: str | None = _kernels("triton").refusal(block_size, features, values)
    return reason


def _kernels(implementation: str) -> Any:
    """The module of an implementation; that of Triton is imported on its first use."""
    if implementation == "triton":
        from tilework.attention.block_sparse import triton

        return triton
    return tiled


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *arguments, implementation = args
    results: tuple[Tensor, Tensor] = _kernels(implementation).forward(*arguments)
    return results


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    query_starts = args[4]
    return empty_results(query, value, query_starts is not None)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, block_size, is_causal, scale, implementation = inputs
    ctx.options = block_size, is_causal, scale, implementation
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _differentiate(
    ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    query, key, value, output, lse, *lists = ctx.saved_tensors
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grads = _attention_backward(
        grad_output, grad_lse, query, key, value, output, lse, *lists, *ctx.options
    )
    needed = (
        grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False)
    )
    return *needed, *[None] * 10


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, implementation = args
    results: tuple[Tensor, Tensor, Tensor] = _kernels(implementation).backward(*arguments)
    return results


def _backward_fake(
    _output: Tensor, _lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    query_starts = args[6]
    return tuple(empty_gradient(t, query_starts is not None) for t in (query, key, value))


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.implementation = inputs[-1]


def _refuse(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        f"block_sparse_attention: implementation={ctx.implementation!r} has no second derivative; "
        "'reference' has"
    )


_OPTIONS = "int[2] block_size, bool is_causal, float scale, str implementation"
_LISTS = (
    "Tensor kv_num_blocks, Tensor kv_indices, Tensor? q_num_blocks, Tensor? q_indices, "
    "Tensor? query_starts, Tensor? key_starts"
)
_attention = _operators.define_by_position(
    f"block_sparse_attention(Tensor query, Tensor key, Tensor value, {_LISTS}, {_OPTIONS}) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_save,
    backward=_differentiate,
)
_attention_backward = _operators.define_by_position(
    "block_sparse_attention_backward(Tensor grad_output, Tensor grad_lse, Tensor query, "
    f"Tensor key, Tensor value, Tensor output, Tensor lse, {_LISTS}, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    setup_context=_save_nothing,
    backward=_refuse,
)
