"""Calls that lead to every kernel of the folder in every configuration."""

from functools import partial

import torch

from tilework.losses._classes.linear import triton
from tilework.losses._classes.linear.common import LinearStats
from tilework.losses._classes.statistics import Statistics

HEAD = frozenset({"input", "linear_weight", "linear_bias"})


def _call(dtype: torch.dtype, every_option: bool) -> None:
    tokens, features, classes = 256, 512, 4096
    given = LinearStats(
        torch.randn(tokens, features).to(dtype),
        torch.randn(classes, features).to(dtype),
        torch.randint(classes, (tokens,)),
        torch.randn(classes).to(dtype) if every_option else None,
        torch.rand(classes) if every_option else None,
        softcap=30.0 if every_option else None,
        temperature=0.7 if every_option else 1.0,
        ignore_index=-100,
        squares=every_option,
        moments=every_option,
        gradient_filter=None,
        implementation="triton",
    )
    results = triton.forward(given)
    vectors = torch.randn(len(Statistics._fields), tokens)
    grads = Statistics(*vectors)
    if not every_option:
        grads = grads._replace(class_gap=None, squares=None, moment=None)
    needed = HEAD if every_option else HEAD - {"linear_bias"}
    for gradient_filter in (None, 1e-3):
        triton.backward(given._replace(gradient_filter=gradient_filter), results, grads, needed)


LAUNCHES = []
for _dtype in (torch.bfloat16, torch.float16, torch.float32):
    for _every_option in (False, True):
        _launch = partial(_call, _dtype, _every_option)
        _launch.__name__ = f"{_dtype}{', every option' if _every_option else ''}"  # type: ignore[attr-defined]
        LAUNCHES.append(_launch)
