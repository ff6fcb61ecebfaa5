"""Calls that lead to every kernel of the folder in every configuration."""

import itertools
from functools import partial
from typing import Any

import torch

from tilework.losses.linear_kl_div import triton
from tilework.losses.linear_kl_div.common import STUDENT, Divergences, Heads


def _call(student: torch.dtype, teacher: torch.dtype, divergence: str, every_option: bool) -> None:
    tokens, features, classes = 256, 512, 4096

    def head(dtype: torch.dtype) -> list[Any]:
        bias = torch.randn(classes).to(dtype) if every_option else None
        return [
            torch.randn(tokens, features).to(dtype),
            torch.randn(classes, features).to(dtype),
            bias,
        ]

    counted = torch.ones(tokens, dtype=torch.bool)
    softcap = 30.0 if every_option else None
    options = (softcap, softcap, 0.7, divergence, 0.3, "triton")
    given = Heads(*head(student), *head(teacher), counted, *options)
    sums = triton.sums(given)
    if divergence == "jsd":
        triton.mixture_sums(given, sums)
    needed = frozenset(STUDENT if every_option else STUDENT[:2])
    results = grads = Divergences(sums[0], sums)
    triton.backward(given, results, grads, needed)


LAUNCHES = []
for _dtypes, _divergence, _every_option in itertools.product(
    [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)],
    ("forward", "reverse", "jsd"),
    (False, True),
):
    # Without options there are fewer registers in use, and one divergence shows that it compiles.
    if _every_option or _divergence == "forward":
        _launch = partial(_call, *_dtypes, _divergence, _every_option)
        _launch.__name__ = f"{_dtypes}, {_divergence}{', every option' if _every_option else ''}"  # type: ignore[attr-defined]
        LAUNCHES.append(_launch)
