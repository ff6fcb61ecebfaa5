"""Calls that lead to every kernel for packed sequences."""

from functools import partial

import torch

from tilework.attention import BlockLayout
from tilework.attention.block_sparse import triton
from tilework.attention.block_sparse.common import Attended, Attention


def _call(features: int, is_causal: bool) -> None:
    shape = 1, 256, 4, features
    query, key, value = (torch.randn(shape).bfloat16().transpose(1, 2) for _ in range(3))
    layout = BlockLayout.from_window((128, 128), 64, left=1, is_causal=True)
    lists = layout.kv_num_blocks, layout.kv_indices, layout.q_num_blocks, layout.q_indices
    starts = torch.tensor([0, 128, 256], dtype=torch.int32)
    given = Attention(query, key, value, *lists, starts, starts, [64, 64], is_causal, 0.1, "triton")
    triton.forward(given)
    results = Attended(query, torch.zeros(1, 256, 4).transpose(1, 2))
    triton.backward(given, results, results, frozenset(("query", "key", "value")))


LAUNCHES = []
for _features, _is_causal in ((64, True), (128, False)):
    _launch = partial(_call, _features, _is_causal)
    _launch.__name__ = f"{_features} features, {_is_causal}"  # type: ignore[attr-defined]
    LAUNCHES.append(_launch)
