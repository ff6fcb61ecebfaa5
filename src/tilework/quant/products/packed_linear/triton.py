"""The product and the gradient of its input on the GPU: kernels, tile sizes and launchers.

Weights are made of codes in registers, a tile at a time, in float32, and rounded to the dtype of
the input before they are multiplied. Few rows are limited by the bytes of the codes: their sums are
split into parts, which a second kernel adds in order. There are no locks and no atomics.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilework import _triton
from tilework._triton import Config, Tuned
from tilework.quant.products.packed_linear.common import (
    Backward,
    Gradient,
    Output,
    Product,
    empty_gradient,
    empty_output,
)

FEW = 16
"""Rows up to which ``DECODE`` holds."""
DECODE = Tuned(
    {
        "sm_80": Config(16, 64, 64, num_warps=4, num_stages=4),
        "sm_90": Config(16, 64, 128, num_warps=4, num_stages=4),
        "sm_100": Config(16, 64, 128, num_warps=4, num_stages=4),
        "gfx942": Config(16, 64, 128, num_warps=4, num_stages=2),
        "float32": Config(16, 32, 64, num_warps=4, num_stages=2),
        "interpreter": Config(16, 32, 16, num_warps=1, num_stages=1),
    },
    otherwise="sm_80",
)
PREFILL = DECODE | {
    "sm_80": Config(64, 128, 64, num_warps=8, num_stages=3),
    "sm_90": Config(128, 128, 64, num_warps=8, num_stages=3),
    "sm_100": Config(128, 128, 64, num_warps=8, num_stages=3),
    "gfx942": Config(64, 128, 64, num_warps=8, num_stages=2),
    "float32": Config(64, 32, 32, num_warps=8, num_stages=2),
}
GRADIENT = PREFILL | {
    "sm_80": Config(64, 64, 64, num_warps=4, num_stages=3),
    "sm_90": Config(128, 64, 64, num_warps=8, num_stages=3),
    "sm_100": Config(128, 64, 64, num_warps=4, num_stages=3),
    "gfx942": Config(64, 64, 64, num_warps=4, num_stages=2),
    # From 64 rows on, Triton takes sm_100's instructions for TF32 whatever the precision.
    "float32": Config(32, 32, 32, num_warps=4, num_stages=2),
}


class Weights(NamedTuple):
    """Codes and grids in contiguous memory; ``group_units`` are the units of a group."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    num_bytes: int
    num_groups: int
    group_units: int


@triton.jit
def weight_tile(
    weights,
    outputs,
    inside,
    first_inner,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """The weights of some outputs and of ``BLOCK_INNER`` inputs in float32.

    Inputs past the last one get finite weights; groups consist of units, as the tile does.
    """
    COUNT: tl.constexpr = outputs.shape[0]
    BYTES: tl.constexpr = BLOCK_INNER * BITS // 8
    UNITS: tl.constexpr = BLOCK_INNER // UNIT
    byte = first_inner * BITS // 8 + tl.arange(0, BYTES)
    codes = tl.load(
        weights.packed + outputs[:, None] * weights.num_bytes + byte[None, :],
        mask=inside[:, None] & (byte < weights.num_bytes)[None, :],
        other=0,
    )
    # Halves of what is left of each byte, the lower one first, until they are codes.
    if BITS <= 4:
        codes = tl.join(codes & 15, codes >> 4).reshape(COUNT, 2 * BYTES)
    if BITS <= 2:
        codes = tl.join(codes & 3, codes >> 2).reshape(COUNT, 4 * BYTES)
    if BITS == 1:
        codes = tl.join(codes & 1, codes >> 1).reshape(COUNT, 8 * BYTES)
    group = (first_inner // UNIT + tl.arange(0, UNITS)) // weights.group_units
    offsets = outputs[:, None] * weights.num_groups + group[None, :]
    mask = inside[:, None] & (group < weights.num_groups)[None, :]
    scale = tl.load(weights.scale + offsets, mask=mask, other=0.0).to(tl.float32)
    zero_point = tl.load(weights.zero_point + offsets, mask=mask, other=0.0).to(tl.float32)
    if UNITS == 1:
        return (codes.to(tl.float32) - zero_point) * scale
    codes = codes.to(tl.float32).reshape(COUNT, UNITS, UNIT)
    return ((codes - zero_point[:, :, None]) * scale[:, :, None]).reshape(COUNT, BLOCK_INNER)


@triton.jit
def product_kernel(
    input_ptr,
    weights,
    bias_ptr,
    output_ptr,
    sizes,
    strides,
    part,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """A tile of outputs, summed over a part of the inputs."""
    num_rows, num_outputs, num_inner = sizes
    # Programs that run together share weights.
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    rows = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = (tl.program_id(0) // row_tiles).to(tl.int64) * BLOCK_COLUMNS
    outputs += tl.arange(0, BLOCK_COLUMNS)
    row_mask, inside = rows < num_rows, outputs < num_outputs
    first = tl.program_id(1) * part
    # Weights are the left factor, which matrix instructions take from registers.
    total = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), tl.float32)
    for start in range(first, tl.minimum(first + part, num_inner), BLOCK_INNER):
        inner = start + tl.arange(0, BLOCK_INNER)
        input = tl.load(
            input_ptr + rows[:, None] * strides[0] + inner.to(tl.int64)[None, :] * strides[1],
            mask=row_mask[:, None] & (inner < num_inner)[None, :],
            other=0.0,
        )
        tile = weight_tile(weights, outputs, inside, start, BITS, UNIT, BLOCK_INNER)
        total = _triton.dot(tile.to(input.dtype), tl.trans(input), total, PRECISION, INTERPRETED)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + outputs, mask=inside, other=0.0).to(tl.float32)[:, None]
    places = (tl.program_id(1) * num_rows + rows)[None, :] * num_outputs + outputs[:, None]
    tl.store(
        output_ptr + places,
        total.to(output_ptr.dtype.element_ty),
        mask=inside[:, None] & row_mask[None, :],
    )


@triton.jit
def sum_kernel(part_ptr, bias_ptr, output_ptr, size, num_outputs, num_parts, BLOCK: tl.constexpr):
    """Outputs from their parts, in their order, and the bias."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(num_parts):
        total += tl.load(part_ptr + place, mask=inside, other=0.0)
        part_ptr += size
    if bias_ptr is not None:
        total += tl.load(bias_ptr + place % num_outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + place, total.to(output_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_kernel(
    grad_ptr,
    weights,
    result_ptr,
    sizes,
    strides,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """A tile of the gradient of the input, summed over the outputs."""
    num_rows, num_outputs, num_inner = sizes
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    rows = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_inner = tl.program_id(0) // row_tiles * BLOCK_INNER
    row_mask = rows < num_rows
    total = tl.zeros((BLOCK_ROWS, BLOCK_INNER), tl.float32)
    for start in range(0, num_outputs, BLOCK_COLUMNS):
        outputs = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        inside = outputs < num_outputs
        grad = tl.load(
            grad_ptr + rows[:, None] * strides[0] + outputs[None, :] * strides[1],
            mask=row_mask[:, None] & inside[None, :],
            other=0.0,
        )
        tile = weight_tile(weights, outputs, inside, first_inner, BITS, UNIT, BLOCK_INNER)
        total = _triton.dot(grad, tile.to(grad.dtype), total, PRECISION, INTERPRETED)
    inner = first_inner + tl.arange(0, BLOCK_INNER)
    tl.store(
        result_ptr + rows[:, None] * num_inner + inner[None, :],
        total.to(result_ptr.dtype.element_ty),
        mask=row_mask[:, None] & (inner < num_inner)[None, :],
    )


def forward(given: Product) -> Output:
    """See ``reference``."""
    input = given.input
    bias = None if given.bias is None else given.bias.contiguous()
    output = empty_output(given).output
    if output.numel() == 0:
        return Output(output)
    num_rows, num_outputs = output.shape
    arch = _triton.architecture(input.device)
    config = (DECODE if num_rows <= FEW else PREFILL).choose(arch, input.dtype)
    programs = triton.cdiv(num_rows, config.block_rows)
    programs *= triton.cdiv(num_outputs, config.block_columns)
    steps = triton.cdiv(given.columns, config.block_inner)
    # Enough to fill the GPU twice, by sizes alone; each part has one step at least.
    wanted = triton.cdiv(2 * _triton.multiprocessors(input.device), programs)
    part = triton.cdiv(steps, min(wanted, steps)) if steps else 1
    num_parts = max(1, triton.cdiv(steps, part))
    parts = output
    if num_parts > 1:
        parts = input.new_empty(num_parts, num_rows, num_outputs, dtype=torch.float32)
    product_kernel[programs, num_parts](
        input,
        _weights(given, config),
        bias if num_parts == 1 else None,
        parts,
        (num_rows, num_outputs, given.columns),
        input.stride(),
        part * config.block_inner,
        **_constants(given, config),
    )
    if num_parts > 1:
        block = 16 if _triton.INTERPRETED else 512
        sum_kernel[(triton.cdiv(output.numel(), block),)](
            parts, bias, output, output.numel(), num_outputs, num_parts, BLOCK=block
        )
    return Output(output)


def backward(given: Backward) -> Gradient:
    """See ``reference``."""
    grad = given.grad_output
    result = empty_gradient(given).input
    if result.numel() == 0:
        return Gradient(result)
    num_rows, num_outputs = grad.shape
    config = GRADIENT.choose(_triton.architecture(grad.device), grad.dtype)
    programs = triton.cdiv(num_rows, config.block_rows)
    programs *= triton.cdiv(given.columns, config.block_inner)
    gradient_kernel[(programs,)](
        grad,
        _weights(given, config),
        result,
        (num_rows, num_outputs, given.columns),
        grad.stride(),
        **_constants(given, config),
    )
    return Gradient(result)


def _unit(given: Product | Backward, config: Config) -> int:
    """Inputs that share a grid, in a group and in a tile: these are multiples of it."""
    if given.group_size is None or given.group_size >= given.columns:
        return config.block_inner
    return math.gcd(given.group_size, config.block_inner)


def _weights(given: Product | Backward, config: Config) -> Weights:
    packed, scale, zero_point = (
        tensor.contiguous() for tensor in (given.packed, given.scale, given.zero_point)
    )
    size = given.columns if given.group_size is None else given.group_size
    units = max(1, triton.cdiv(size, _unit(given, config)))
    return Weights(packed, scale, zero_point, packed.shape[1], scale.shape[1], units)


def _constants(given: Product | Backward, config: Config) -> dict[str, Any]:
    return {
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "INTERPRETED": _triton.INTERPRETED,
        "BITS": given.bits,
        "UNIT": _unit(given, config),
        **config.arguments(),
    }
