"""Calls that lead to every kernel of the folder in every configuration."""

from functools import partial

import torch

from tilework.attention import BlockLayout
from tilework.attention.block_sparse import triton
from tilework.attention.block_sparse.common import Attended, Attention


def _call(dtype: torch.dtype, features: int, block: int, is_causal: bool) -> None:
    length, heads = 4 * block, 4
    query = torch.randn(1, heads, length, features).to(dtype)
    key, value = (torch.randn(1, 2, length, features).to(dtype) for _ in range(2))
    layout = BlockLayout.from_window((length, length), block, left=1, is_causal=True)
    lists = (
        layout.kv_num_blocks,
        layout.kv_indices,
        layout.q_num_blocks,
        layout.q_indices,
        None,
        None,
    )
    given = Attention(query, key, value, *lists, [block, block], is_causal, 0.1, "triton")
    triton.forward(given)
    results = Attended(query, torch.zeros(1, heads, length))
    triton.backward(given, results, results, frozenset(("query", "key", "value")))


LAUNCHES = []
for _dtype in (torch.bfloat16, torch.float32):
    for _features, _block, _is_causal in (
        (64, 64, True),
        (128, 64, True),
        (128, 128, False),
        (256, 64, True),
        (32, 64, False),
    ):
        _launch = partial(_call, _dtype, _features, _block, _is_causal)
        _launch.__name__ = f"{_dtype} {_features} features, blocks of {_block}, {_is_causal}"  # type: ignore[attr-defined]
        LAUNCHES.append(_launch)
