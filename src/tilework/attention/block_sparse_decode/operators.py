"""The operator of block-sparse decoding. It does not differentiate."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from tilework import _operators
from tilework.attention.block_sparse_decode import reference
from tilework.attention.block_sparse_decode.common import (
    Decoded,
    Decoding,
    empty_results,
    operations,
)


def refusal(features: int, values: int) -> str | None:
    """Why the kernels do not take these sizes, if they do not."""
    from tilework.attention.block_sparse_decode import triton

    reason: str | None = triton.refusal(features, values)
    return reason


_of_implementation = _operators.of_rooms(__package__, "forward")


def _forward(given: Decoding) -> Decoded:
    if given.kv_indices is not None and given.kv_indices.dim() == 4:
        return _by_token(given, given.kv_indices)
    results: Decoded = _of_implementation(given)
    return results


def _by_token(given: Decoding, kv_indices: Tensor) -> Decoded:
    """Tokens with lists of their own share no keys: each is the last one of a sequence."""
    query, counts = given.query, given.kv_num_blocks
    batch, heads, length, _ = query.shape

    def split(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).flatten(0, 1)

    table = given.block_table
    if table is None:
        table = torch.arange(batch, device=query.device)[:, None]
    end = query.new_full((batch,), given.key_cache.shape[1], dtype=torch.int64)
    end = (end if given.seq_lengths is None else given.seq_lengths.long())[:, None]
    output, lse = _of_implementation(
        given._replace(
            query=split(query)[:, :, None],
            block_table=table.repeat_interleave(length, 0),
            seq_lengths=(end - length + 1 + torch.arange(length, device=query.device)).flatten(),
            kv_indices=split(kv_indices),
            kv_num_blocks=None if counts is None else split(counts),
        )
    )
    output = output.view(batch, length, heads, output.shape[-1]).transpose(1, 2)
    return Decoded(output.contiguous(), lse.view(batch, length, heads).mT.contiguous())


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError("block_sparse_decode: it is for inference and has no gradients")


decode = _operators.or_reference(
    _operators.define(
        "block_sparse_decode",
        Decoding,
        Decoded,
        _forward,
        empty_results,
        derivative=_refuse,
        operations=operations,
    ),
    reference.forward,
)
