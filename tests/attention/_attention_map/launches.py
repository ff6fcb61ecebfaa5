"""Calls that lead to every kernel of the folder in every configuration."""

from functools import partial

import torch

from tilework.attention._attention_map import triton


def _call(dtype: torch.dtype, features: int, block: int, is_causal: bool) -> None:
    query = torch.randn(1, 4, 300, features).to(dtype)
    key = torch.randn(1, 2, 300, features).to(dtype)
    lse = torch.zeros(1, 4, 300)
    triton.attention_lse(query, key, is_causal, 0.1)
    triton.attention_entropy(query, key, lse, is_causal, 0.1)
    triton.attention_column_mass(query, key, lse, 7, is_causal, 0.1)
    triton.block_pooled_attention(query, key, lse, [block, block], is_causal, is_causal, 0.1)
    triton.backward(query, key, lse, lse, lse if is_causal else None, is_causal, 0.1)


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
