"""What reductions of the map of attention share: checks and the choice of an implementation."""

from dataclasses import replace

from torch import Tensor

from tilework import _checks, _implementations
from tilework._implementations import Implementation
from tilework._operators import computation_dtype
from tilework.attention._attention_map import operators
from tilework.attention._tensors import cast_under_autocast, check_scale, check_tensors

IMPLEMENTATIONS = (
    Implementation.triton(
        "the result",
        refuses=lambda query: operators.refusal(query.shape[-1]),
        when="up to 256 features",
    ),
    Implementation("tiled", "query and key in float32, and a few tiles of 4 MiB"),
    Implementation.reference("all scores, several times"),
)
CONSTANT = tuple(
    replace(entry, backward="none: the result is a constant") for entry in IMPLEMENTATIONS
)


def prepare(
    function: str,
    table: _implementations.Table,
    query: Tensor,
    key: Tensor,
    lse: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor, float | None, str]:
    """Check the arguments of a public function; return query, key, scale and implementation."""
    check_tensors(function, query, key, None, enable_gqa)
    scale = check_scale(function, scale)
    query, key = cast_under_autocast(query, key)
    if lse is not None:
        dtype = computation_dtype(query.dtype)
        _checks.floating(function, "lse", lse)
        _checks.shape(function, "lse", lse, query.shape[:3])
        if lse.dtype != dtype:
            accepted = f"{dtype} as query is {query.dtype}".replace("torch.", "")
            raise _checks.bad_type(function, "lse", accepted, lse)
        _checks.same_device(function, query=query, lse=lse)
    chosen = _implementations.choose(function, table, implementation, query)
    return (
        query,
        key,
        scale,
        chosen,
    )
