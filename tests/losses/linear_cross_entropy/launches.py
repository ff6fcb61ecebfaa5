"""Calls that lead to every kernel of the folder in every configuration."""

from functools import partial

import torch

from tilework.losses._classes.linear import triton


def _call(dtype: torch.dtype, every_option: bool) -> None:
    tokens, features, classes = 256, 512, 4096
    hidden = torch.randn(tokens, features).to(dtype)
    weight = torch.randn(classes, features).to(dtype)
    arguments = (
        hidden,
        weight,
        torch.randint(classes, (tokens,)),
        torch.randn(classes).to(dtype) if every_option else None,
        torch.rand(classes) if every_option else None,
    )
    softcap = 30.0 if every_option else None
    options = (softcap, 0.7 if every_option else 1.0, -100)
    triton.forward(*arguments, *options, every_option, None)
    vectors = list(torch.randn(6, tokens))
    upstream = [*vectors[:3], vectors[3] if every_option else None]
    for gradient_filter in (None, 1e-3):
        needed = [True, True, every_option]
        triton.backward(*upstream, *arguments, *vectors[4:], *options, gradient_filter, needed)
    triton.logit_gradient_(
        torch.randn(tokens, classes).to(dtype),
        *arguments[2:],
        vectors[0],
        *(vectors[1:3] if every_option else (None, None)),
        softcap,
        -100,
        torch.zeros(classes) if every_option else None,
    )


LAUNCHES = []
for _dtype in (torch.bfloat16, torch.float16, torch.float32):
    for _every_option in (False, True):
        _launch = partial(_call, _dtype, _every_option)
        _launch.__name__ = f"{_dtype}{', every option' if _every_option else ''}"  # type: ignore[attr-defined]
        LAUNCHES.append(_launch)
