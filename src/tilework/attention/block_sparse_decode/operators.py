"""The operator of block-sparse decoding. It does not differentiate."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tilework import _operators
from tilework._operators import computation_dtype
from tilework.attention.block_sparse_decode import reference, tiled


def decode(*args: Any) -> tuple[Tensor, Tensor]:
    """See ``reference.block_sparse_decode``; the implementation comes last."""
    *arguments, implementation = args
    if implementation == "reference" or _operators.only_reference():
        return reference.block_sparse_decode(*arguments)
    results: tuple[Tensor, Tensor] = _decode(*args)
    return results


def refusal(features: int, values: int) -> str | None:
    """Why the kernels do not take these sizes, if they do not."""
    reason: str | None = _kernels("triton").refusal(features, values)
    return reason


def _kernels(implementation: str) -> Any:
    """The module of an implementation; that of Triton is imported on its first use."""
    if implementation == "triton":
        from tilework.attention.block_sparse_decode import triton

        return triton
    return tiled


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *arguments, implementation = args
    forward = _kernels(implementation).forward
    kv_indices = arguments[5]
    has_lists_of_tokens = kv_indices is not None and kv_indices.dim() == 4
    run = partial(_by_token, forward) if has_lists_of_tokens else forward
    results: tuple[Tensor, Tensor] = run(*arguments)
    return results


def _by_token(
    forward: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor | None,
    seq_lengths: Tensor | None,
    kv_indices: Tensor,
    kv_num_blocks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Tokens with lists of their own share no keys: each is the last one of a sequence."""
    batch, heads, length, _ = query.shape

    def split(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).flatten(0, 1)

    if block_table is None:
        block_table = torch.arange(batch, device=query.device)[:, None]
    end = query.new_full((batch,), key_cache.shape[1], dtype=torch.int64)
    end = (end if seq_lengths is None else seq_lengths.long())[:, None]
    output, lse = forward(
        split(query)[:, :, None],
        key_cache,
        value_cache,
        block_table.repeat_interleave(length, 0),
        (end - length + 1 + torch.arange(length, device=query.device)).flatten(),
        split(kv_indices),
        None if kv_num_blocks is None else split(kv_num_blocks),
        *options,
    )
    output = output.view(batch, length, heads, output.shape[-1])
    return output.transpose(1, 2).contiguous(), lse.view(batch, length, heads).mT.contiguous()


def _forward_fake(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    shape = query.shape[:3]
    return (
        query.new_empty(*shape, value_cache.shape[-1]),
        query.new_empty(shape, dtype=computation_dtype(query.dtype)),
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError("block_sparse_decode: it is for inference and has no gradients")


_decode = _operators.define_by_position(
    "block_sparse_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? block_table, "
    "Tensor? seq_lengths, Tensor? kv_indices, Tensor? kv_num_blocks, int block_size, float scale, "
    "str implementation) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_save_nothing,
    backward=_refuse,
)
