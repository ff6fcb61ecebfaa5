"""What reductions of the map of attention share: checks and the choice of an implementation."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tilework import _checks, _operators
from tilework._operators import Implementation, computation_dtype
from tilework.attention._attention_map import operators
from tilework.attention._tensors import cast_under_autocast, check_tensors

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

IMPLEMENTATIONS = (
    Implementation(
        "triton",
        devices=("cuda",),
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        memory="the result",
        backward="first order; higher orders and forward mode by the reference",
        deterministic=True,
        needs="triton",
        checked_on="Triton's interpreter",
    ),
    Implementation(
        "tiled",
        devices=(),
        dtypes=_FLOATING,
        memory="query and key in float32, and a few tiles of 4 MiB",
        backward="first order; higher orders and forward mode by the reference",
        deterministic=True,
        checked_on="CPU",
    ),
    Implementation(
        "reference",
        devices=(),
        dtypes=_FLOATING,
        memory="all scores, several times",
        backward="every order and mode",
        deterministic=True,
        checked_on="CPU",
    ),
)
CONSTANT = tuple(
    replace(entry, backward="none: the result is a constant") for entry in IMPLEMENTATIONS
)


def prepare(
    function: str,
    table: Sequence[Implementation],
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, float, str]:
    """Check the arguments of a public function; return query, key, scale and implementation."""
    check_tensors(function, query, key, None, enable_gqa)
    if scale is not None:
        _checks.number(function, "scale", scale)
    query, key = cast_under_autocast(query, key)
    if lse is not None:
        dtype = computation_dtype(query.dtype)
        _checks.floating(function, "lse", lse)
        _checks.shape(function, "lse", lse, query.shape[:3])
        if lse.dtype != dtype:
            accepted = f"{dtype} as query is {query.dtype}".replace("torch.", "")
            raise _checks.bad_type(function, "lse", accepted, lse)
        _checks.same_device(function, query=query, lse=lse)
    limits = {"triton": lambda: operators.refusal(query.shape[-1])}
    chosen = _operators.choose(function, table, implementation, query, limits)
    return (
        query,
        key,
        1 / math.sqrt(max(1, query.shape[-1])) if scale is None else float(scale),
        chosen,
    )
