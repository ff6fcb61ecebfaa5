"""Calls that lead to every kernel of the folder in every configuration."""

from functools import partial

import torch

from tilework.attention._attention_map import triton
from tilework.attention._attention_map.common import (
    Blocks,
    Columns,
    Entropy,
    LogSumExp,
    Queries,
    Rows,
)


def _call(dtype: torch.dtype, features: int, block: int, is_causal: bool) -> None:
    query = torch.randn(1, 4, 300, features).to(dtype)
    key = torch.randn(1, 2, 300, features).to(dtype)
    lse = torch.zeros(1, 4, 300)
    options = is_causal, 0.1, "triton"
    queries, rows = Queries(query, key, *options), Rows(query, key, lse, *options)
    triton.attention_lse(queries)
    triton.attention_entropy(rows)
    triton.attention_column_mass(Columns(query, key, lse, 7, *options))
    triton.block_pooled_attention(Blocks(query, key, lse, block, block, is_causal, *options))
    needed = frozenset(("query", "key"))
    if is_causal:
        results = Entropy(lse, lse)
        triton.attention_entropy_backward(rows, results, results, needed)
    else:
        triton.attention_lse_backward(queries, LogSumExp(lse), LogSumExp(lse), needed)


LAUNCHES = []
for _dtype, _features, _block, _is_causal in (
    (torch.bfloat16, 64, 64, True),
    (torch.bfloat16, 128, 64, False),
    (torch.bfloat16, 256, 40, True),
    (torch.float32, 64, 64, True),
):
    _launch = partial(_call, _dtype, _features, _block, _is_causal)
    _launch.__name__ = f"{_dtype} {_features} features, blocks of {_block}, {_is_causal}"  # type: ignore[attr-defined]
    LAUNCHES.append(_launch)
