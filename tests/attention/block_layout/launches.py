"""Calls that lead to every kernel of the folder in every configuration."""

from functools import partial

import torch

from tilework.attention.block_layout import triton
from tilework.attention.block_layout.common import Dense, Positions, TopK


def _call(dtype: torch.dtype, columns: int, is_causal: bool, is_shared: bool) -> None:
    scores = torch.randn(1, 2, 6, columns).to(dtype)
    places = None if is_shared else torch.full((1, 2, 6), 9)
    given = TopK(scores, places, 9, 12, 64, 64, 384, 1, is_causal, is_causal)
    lists = triton.topk(given)
    for is_transposed in (False, True):
        triton.positions(Positions(*triton.dense(Dense(*lists, columns, is_transposed)), 6))


LAUNCHES = []
for _dtype in (torch.bfloat16, torch.float32, torch.float64):
    for _columns, _is_causal, _is_shared in (
        (7, True, True),
        (512, True, True),
        (512, False, False),
        (8192, True, False),
    ):
        _launch = partial(_call, _dtype, _columns, _is_causal, _is_shared)
        _launch.__name__ = f"{_dtype} {_columns} columns, {_is_causal}, {_is_shared}"  # type: ignore[attr-defined]
        LAUNCHES.append(_launch)
