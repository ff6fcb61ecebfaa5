"""Calls that lead to every kernel of the folder in every configuration."""

from functools import partial

import torch

from tilework.losses.linear_cross_entropy import triton


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
    options = (30.0 if every_option else None, -100)
    triton.forward(*arguments, *options)
    vectors = torch.randn(4, tokens).unbind()
    triton.backward(*vectors[:3], *arguments, *vectors[3:], *options, [True, True, every_option])


LAUNCHES = []
for _dtype in (torch.bfloat16, torch.float16, torch.float32):
    for _every_option in (False, True):
        _launch = partial(_call, _dtype, _every_option)
        _launch.__name__ = f"{_dtype}{', every option' if _every_option else ''}"  # type: ignore
        LAUNCHES.append(_launch)
