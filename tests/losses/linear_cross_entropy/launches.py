"""Calls that lead to every kernel of the folder in every configuration."""

from functools import partial
from typing import Any

import torch

from tilework.losses._classes.linear import triton
from tilework.losses._classes.linear.common import LinearStats
from tilework.losses._classes.statistics import Statistics

HEAD = frozenset({"input", "linear_weight", "linear_bias"})


# What losses ask for together; more takes more registers than there are.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias, weights, softcap": {"bias": True, "weights": True, "softcap": 30.0},
    "bias, squares": {"bias": True, "squares": True},
    "bias, softcap, temperature, moments": {
        "bias": True,
        "softcap": 30.0,
        "temperature": 0.7,
        "moments": True,
    },
}


def _call(
    dtype: torch.dtype,
    *,
    bias: bool = False,
    weights: bool = False,
    softcap: float | None = None,
    temperature: float = 1.0,
    squares: bool = False,
    moments: bool = False,
) -> None:
    tokens, features, classes = 256, 512, 4096
    given = LinearStats(
        torch.randn(tokens, features).to(dtype),
        torch.randn(classes, features).to(dtype),
        torch.randint(classes, (tokens,)),
        torch.randn(classes).to(dtype) if bias else None,
        torch.rand(classes) if weights else None,
        softcap,
        temperature,
        -100,
        squares,
        moments,
        None,
        "triton",
    )
    results = triton.forward(given)
    grads = Statistics(*torch.randn(len(Statistics._fields), tokens))
    needed = HEAD if bias else HEAD - {"linear_bias"}
    for gradient_filter in (None, 1e-3):
        triton.backward(given._replace(gradient_filter=gradient_filter), results, grads, needed)


LAUNCHES = []
for _dtype in (torch.bfloat16, torch.float16, torch.float32):
    for _name, _options in OPTIONS.items():
        _launch = partial(_call, _dtype, **_options)
        _launch.__name__ = f"{_dtype}, {_name}"  # type: ignore[attr-defined]
        LAUNCHES.append(_launch)
