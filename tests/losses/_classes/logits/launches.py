"""Calls that lead to both kernels of logits in every configuration."""

from functools import partial

import torch

from tilework.losses._classes.logits import triton
from tilework.losses._classes.logits.common import LogitStats
from tilework.losses._classes.statistics import Formula, Rows, Statistics


def _call(shape: tuple[int, ...], dtype: torch.dtype, every_option: bool) -> None:
    input = torch.zeros(shape, dtype=dtype)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
    weight = torch.zeros(shape[1]) if every_option else None
    given = LogitStats(input, target, weight, -100, every_option, every_option, "triton")
    results = triton.forward(given)
    grads = Statistics(*torch.zeros(len(Statistics._fields), *target.shape))
    if not every_option:
        grads = grads._replace(class_gap=None, squares=None, moment=None)
    triton.backward(given, results, grads, frozenset({"input"}))


def _of_chunks(classes: int, dtype: torch.dtype) -> None:
    """In place, of outputs with a bias, capped."""
    zeros = torch.zeros(16)
    triton.logit_gradient_(
        torch.zeros(16, classes, dtype=dtype),
        torch.zeros(16, dtype=torch.int64),
        -100,
        torch.zeros(classes, dtype=dtype),
        30.0,
        torch.zeros(classes),
        Formula(lambda statistics, rows: statistics.nll + statistics.class_gap),
        Rows(zeros, zeros, classes, zeros.sum()),
        (),
        torch.zeros(classes),
    )


_SHAPES = {
    "few adjacent": (128, 256),
    "adjacent": (16, 262144),
    "few apart": (2, 7, 64),
    "apart": (2, 256, 64),
}
LAUNCHES = []
for _dtype in (torch.bfloat16, torch.float32):
    for _name, _shape in _SHAPES.items():
        for _every_option in (False, True):
            if _dtype == torch.bfloat16 or (_every_option and "few" not in _name):
                _launch = partial(_call, _shape, _dtype, _every_option)
                _launch.__name__ = f"{_name} {_dtype}{', every option' if _every_option else ''}"  # type: ignore[attr-defined]
                LAUNCHES.append(_launch)
for _classes in (256, 262144):
    _launch = partial(_of_chunks, _classes, torch.bfloat16)
    _launch.__name__ = f"chunks of {_classes}"  # type: ignore[attr-defined]
    LAUNCHES.append(_launch)
