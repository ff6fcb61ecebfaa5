"""The operator of block-sparse decoding. It does not differentiate."""

from typing import Any

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
    results: tuple[Tensor, Tensor] = _kernels(implementation).forward(*arguments)
    return results


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


_decode = _operators.define(
    "block_sparse_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? block_table, "
    "Tensor? seq_lengths, Tensor? kv_indices, Tensor? kv_num_blocks, int block_size, float scale, "
    "str implementation) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_save_nothing,
    backward=_refuse,
)
