"""Calls that lead to every kernel of the folder in every configuration."""

from functools import partial

import torch

from tilework.attention.block_sparse_decode import triton
from tilework.attention.block_sparse_decode.common import Decoding


def _call(dtype: torch.dtype, features: int, heads: int, is_paged: bool, length: int) -> None:
    query = torch.randn(1, heads, length, features).to(dtype)
    if is_paged:
        cache = torch.randn(40, 16, 2, features).to(dtype)
        table = torch.arange(40, dtype=torch.int32)[None]
        lists = torch.zeros(1, 2, 8, dtype=torch.int32), torch.ones(1, 2, dtype=torch.int32)
        arguments = table, torch.tensor([600]), *lists
    else:
        cache = torch.randn(1, 640, 2, features).to(dtype)
        arguments = None, None, torch.zeros(1, 1, 8, dtype=torch.int64), None
    triton.forward(Decoding(query, cache, cache, *arguments, 64, 0.1, "triton"))


LAUNCHES = []
for _dtype in (torch.bfloat16, torch.float32):
    for _features, _heads, _is_paged, _length in (
        (64, 8, True, 1),
        (128, 8, True, 1),
        (128, 2, False, 1),
        (128, 128, True, 1),
        (256, 16, False, 1),
        (64, 8, True, 3),
        (128, 2, False, 4),
        (128, 8, True, 16),
        (256, 16, True, 5),
    ):
        _launch = partial(_call, _dtype, _features, _heads, _is_paged, _length)
        _launch.__name__ = (  # type: ignore[attr-defined]
            f"{_dtype} {_features} features, {_heads} heads, {_is_paged}, {_length} tokens"
        )
        LAUNCHES.append(_launch)
