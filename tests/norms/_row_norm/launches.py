"""Calls that lead to every kernel of the folder in every configuration."""

from functools import partial

import torch

from tilework.norms._row_norm import triton


def _call(dtype: torch.dtype, centered: bool, num_features: int) -> None:
    rows = 4
    input = torch.empty(rows, num_features, dtype=dtype)
    weight = torch.empty(num_features, dtype=dtype)
    bias = weight if centered else None
    options = (1, num_features, 1e-5, 1.0, centered)
    triton.forward(input, input, weight, bias, *options)
    statistics = torch.empty(2, rows).unbind()
    needed = [True, True, centered]
    triton.backward(input, input, input, weight, bias, *statistics, *options, dtype, needed)


def _strided() -> None:
    """Heads of queries with weights of their own, before they are transposed."""
    query = torch.empty(2, 5, 3, 128, dtype=torch.bfloat16).transpose(1, 2)
    weight = torch.empty(5, 128)
    options = (1, 128, 1e-5, 0.0, False)
    triton.forward(query, query, weight, None, *options)
    rstd = torch.empty(2, 3, 5)
    triton.backward(
        query, query, query, weight, None, rstd, rstd, *options, query.dtype, [True, True, False]
    )


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
