"""Calls that lead to every kernel of the folder in every configuration."""

from functools import partial

import torch

from tilework.norms._row_norm import triton
from tilework.norms._row_norm.common import Backward, RowNorm


def _both(given: RowNorm, upstream: torch.Tensor, needed: list[bool]) -> None:
    results = triton.forward(given)
    triton.backward(
        Backward(
            upstream,
            upstream,
            given.input,
            given.weight,
            given.bias,
            results.mean,
            results.rstd,
            given.dims,
            given.num_measured,
            given.eps,
            given.weight_offset,
            given.centered,
            given.input.dtype,
            needed,
            "triton",
        )
    )


def _call(dtype: torch.dtype, centered: bool, num_features: int) -> None:
    input = torch.empty(4, num_features, dtype=dtype)
    weight = torch.empty(num_features, dtype=dtype)
    bias = weight if centered else None
    options = (1, num_features, 1e-5, 1.0, centered)
    given = RowNorm(input, input, weight, bias, *options, dtype, dtype, "triton")
    _both(given, input, [True, True, centered])


def _strided() -> None:
    """Heads of queries with weights of their own, before they are transposed."""
    query = torch.empty(2, 5, 3, 128, dtype=torch.bfloat16).transpose(1, 2)
    options = (1, 128, 1e-5, 0.0, False)
    dtypes = query.dtype, query.dtype
    given = RowNorm(query, query, torch.empty(5, 128), None, *options, *dtypes, "triton")
    _both(given, query, [True, True, False])


# Short rows, rows that a backward holds and reads again, the longest of these, and longer ones.
SIZES = {
    torch.bfloat16: (128, 4096, 16384, 65536),
    torch.float32: (128, 4096, 65536),
    torch.float16: (1024,),
}
LAUNCHES = [_strided]
for _dtype, _sizes in SIZES.items():
    for _num_features in _sizes:
        for _centered in (False, True):
            _launch = partial(_call, _dtype, _centered, _num_features)
            _launch.__name__ = f"{'layer' if _centered else 'rms'} {_dtype} {_num_features}"  # type: ignore[attr-defined]
            LAUNCHES.append(_launch)  # type: ignore[arg-type]
