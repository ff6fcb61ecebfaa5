"""Small helpers shared by kernels: block sizes by architecture, and exact elementary functions."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter on the CPU."""


@dataclass(frozen=True)
class Config:
    """Block sizes of a kernel, and the warps and pipeline stages of a program."""

    block_rows: int
    block_columns: int
    block_inner: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        """What a launch takes, under the names that the kernels use."""
        return {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_COLUMNS": self.block_columns,
            "BLOCK_INNER": self.block_inner,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@functools.cache
def architecture(device: torch.device) -> str:
    """Such as ``sm_90`` or ``gfx942``; ``interpreter`` for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many run programs at the same time; 2 for the CPU, so that tests have several."""
    if device.type != "cuda":
        return 2
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """``total + left @ right``."""
    if INTERPRETED:
        # The interpreter multiplies the bits of bfloat16 as integers.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32, within a few rounding units also near zero."""
    size = tl.abs(x)
    decay = tl.exp(-2 * size)
    square = x * x
    series = size * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    result = tl.where(size < 0.2, series, (1 - decay) / (1 + decay))
    return tl.where(x < 0, -result, result)


@triton.jit
def expm1(x):
    """``exp(x) - 1`` in float32, within a few rounding units also near zero."""
    series = 1 + x / 7 * (1 + x / 8 * (1 + x / 9))
    series = 1 + x / 4 * (1 + x / 5 * (1 + x / 6 * series))
    series = x * (1 + x / 2 * (1 + x / 3 * series))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """``log(1 + x)`` in float32, within a few rounding units also near zero."""
    ratio = x / (2 + x)
    square = ratio * ratio
    series = 1 / 7 + square * (1 / 9 + square * (1 / 11 + square * (1 / 13)))
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * series))
    return tl.where(tl.abs(x) < 0.5, 2 * ratio * series, tl.log(1 + x))
