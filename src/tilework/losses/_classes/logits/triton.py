"""The statistics of logits on the GPU, and their gradient: kernels, block sizes and launchers.

Forward: a program reads the classes of some rows once. Backward: each program reads a tile of
logits and writes its gradient, with whatever strides the logits have. There are no atomics, and the
order of every sum depends on the number of classes alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilework import _triton
from tilework._operators import Needed
from tilework._triton import Tuned
from tilework.losses._classes.kernels import Upstream, add_tile, contiguous, tile_gradient
from tilework.losses._classes.logits.common import LogitStats
from tilework.losses._classes.statistics import Formula, Rows, Statistics, empty, of_wanted


class Tile(NamedTuple):
    """Rows and classes that a program takes at a time."""

    block_rows: int
    block_classes: int
    num_warps: int


# Classes that lie side by side; few of them leave a program more rows.
ADJACENT = Tuned({"sm_90": Tile(1, 4096, 8), "interpreter": Tile(2, 32, 1)}, otherwise="sm_90")
# Rows that lie side by side, as those of images.
APART = Tuned({"sm_90": Tile(32, 32, 4), "interpreter": Tile(16, 8, 1)}, otherwise="sm_90")


class Logits(NamedTuple):
    """Logits as kernels take them: row ``n * inner + s`` is at ``n`` and ``s`` of its strides.

    What the matrix holds are outputs; the logits are these with the bias, capped.
    """

    outputs: Tensor
    strides: tuple[int, ...]
    sizes: tuple[int, ...]
    bias: Tensor | None
    bias_stride: int
    softcap: float | None

    @classmethod
    def of(
        cls, outputs: Tensor, bias: Tensor | None = None, softcap: float | None = None
    ) -> "Logits":
        """Of shape (N, C) or (N, C, S)."""
        rows, classes, *rest = outputs.shape
        inner = rest[0] if rest else 1
        strides = (*outputs.stride(), 0)[:3]
        sizes = rows * inner, classes, inner
        return cls(outputs, strides, sizes, bias, 0 if bias is None else bias.stride(0), softcap)


@triton.jit
def _places(sizes, strides, rows, columns):
    """Offsets of a tile in 64 bits."""
    of_rows = rows // sizes[2] * strides[0] + rows % sizes[2] * strides[2]
    return of_rows[:, None] + columns.to(tl.int64)[None, :] * strides[1]


@triton.jit
def _outputs(logits, rows, columns, mask):
    """A tile of outputs with their bias, in float32."""
    places = _places(logits.sizes, logits.strides, rows, columns)
    values = tl.load(logits.outputs + places, mask=mask, other=0.0).to(tl.float32)
    if logits.bias is not None:
        inside = columns < logits.sizes[1]
        bias = tl.load(logits.bias + columns * logits.bias_stride, mask=inside, other=0.0)
        values += bias.to(tl.float32)[None, :]
    return values


@triton.jit
def statistics_kernel(
    logits,
    target_ptr,
    class_weight_ptr,
    results,
    ignore_index,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """Statistics of a block of rows, tile by tile of classes."""
    num_rows, num_classes, _inner = logits.sizes
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < num_rows
    target = tl.load(target_ptr + rows, mask=inside, other=ignore_index)
    kept = inside & (target != ignore_index)
    peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    base = tl.zeros((BLOCK_ROWS,), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    target_logit = tl.zeros((BLOCK_ROWS,), tl.float32)
    gap = tl.zeros((BLOCK_ROWS,), tl.float32)
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    moment = tl.zeros((BLOCK_ROWS,), tl.float32)
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    argmax = tl.zeros((BLOCK_ROWS,), tl.int64)
    weight_seen = 0.0
    for first in range(0, num_classes, BLOCK_CLASSES):
        columns = first + tl.arange(0, BLOCK_CLASSES)
        mask = kept[:, None] & (columns < num_classes)[None, :]
        values = _outputs(logits, rows, columns, mask)
        if results.moment is not None:
            tile_top = tl.max(tl.where(mask, values, float("-inf")), 1)
            place = tl.where(mask & (values == tile_top[:, None]), columns[None, :], 1 << 30)
            argmax = tl.where(tile_top > top, tl.min(place, 1).to(tl.int64), argmax)
            top = tl.maximum(top, tile_top)
        if logits.softcap is not None:
            values = logits.softcap * _triton.tanh(values / logits.softcap)
        is_target = columns[None, :] == target[:, None]
        target_logit += tl.sum(tl.where(mask & is_target, values, 0.0), 1)
        weights = None
        if class_weight_ptr is not None:
            weights = tl.load(class_weight_ptr + columns, mask=columns < num_classes, other=0.0)
        peak, base, total, gap, weight_seen, squares, moment = add_tile(
            values,
            mask,
            is_target,
            weights,
            peak,
            base,
            total,
            gap,
            weight_seen,
            squares,
            moment,
            results.squares is not None,
            results.moment is not None,
        )
    # The largest of numbers and nan is a number; the total tells.
    base = tl.where((total != total) & (base < float("inf")), total, base)
    known = (target >= 0) & (target < num_classes)
    target_gap = tl.where(known, base - target_logit, float("nan"))
    tl.store(results.shift + rows, tl.where(kept, base, 0.0), mask=inside)
    tl.store(results.total + rows, tl.where(kept, total, 1.0), mask=inside)
    tl.store(results.target_gap + rows, tl.where(kept, target_gap, 0.0), mask=inside)
    tl.store(results.class_gap + rows, tl.where(kept, gap, 0.0), mask=inside)
    if results.squares is not None:
        tl.store(results.squares + rows, tl.where(kept, squares, 0.0), mask=inside)
    if results.moment is not None:
        tl.store(results.moment + rows, tl.where(kept, moment, 0.0), mask=inside)
        tl.store(results.top + rows, tl.where(kept, top, 0.0), mask=inside)
        tl.store(results.argmax + rows, tl.where(kept, argmax, 0), mask=inside)


@triton.jit
def gradient_kernel(
    logits,
    target_ptr,
    class_weight_ptr,
    upstream,
    gradient_ptr,
    gradient_strides,
    ignore_index,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    """The gradient of a tile of outputs, which may take the place of these."""
    num_rows, num_classes, _inner = logits.sizes
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    inside = rows < num_rows
    target = tl.load(target_ptr + rows, mask=inside, other=ignore_index)
    kept = inside & (target != ignore_index)
    column_mask = columns < num_classes
    values = _outputs(logits, rows, columns, kept[:, None] & column_mask[None, :])
    slope = 1.0
    if logits.softcap is not None:
        values = _triton.tanh(values / logits.softcap)
        slope = 1 - values * values
        values *= logits.softcap
    is_target = columns[None, :] == target[:, None]
    weights = None
    if upstream.class_gap is not None:
        weights = tl.load(class_weight_ptr + columns, mask=column_mask, other=0.0)
    grad = tile_gradient(values, upstream, rows, kept, is_target, weights)
    grad = tl.where(kept[:, None], grad * slope, 0.0)
    places = _places(logits.sizes, gradient_strides, rows, columns)
    tl.store(
        gradient_ptr + places,
        grad.to(gradient_ptr.dtype.element_ty),
        mask=inside[:, None] & column_mask[None, :],
    )


def forward(given: LogitStats) -> Statistics:
    """See :class:`Statistics`. The class weights are those of ``class_gap``."""
    results = empty(given.input, given.target, given.squares, given.moments)
    _measure(Logits.of(given.input), given.target, given.class_weight, given.ignore_index, results)
    return results


def backward(
    given: LogitStats, results: Statistics, grads: Statistics, needed: Needed
) -> dict[str, Tensor]:
    """The gradient of the logits."""
    grads = of_wanted(grads, given.squares, given.moments)
    gradient = torch.empty_like(given.input, memory_format=torch.contiguous_format)
    _differentiate(
        Logits.of(given.input),
        given.target,
        given.class_weight,
        given.ignore_index,
        results.shift,
        grads,
        gradient,
    )
    return {"input": gradient}


def logit_gradient_(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    linear_bias: Tensor | None,
    softcap: float | None,
    class_weight: Tensor | None,
    formula: Formula,
    rows: Rows,
    numbers: Sequence[float],
    grad_bias: Tensor | None,
) -> Tensor:
    """See ``chunked.logit_gradient_``."""
    outputs = Logits.of(logits, linear_bias, softcap)
    statistics = empty(logits, target, formula.squares, formula.moments)
    _measure(outputs, target, class_weight, ignore_index, statistics)
    losses, grads = formula.gradients(statistics, rows, numbers)
    _differentiate(outputs, target, class_weight, ignore_index, statistics.shift, grads, logits)
    if grad_bias is not None:
        grad_bias += logits.sum(0, dtype=torch.float32)
    return losses.where(target != ignore_index, 0)


def _measure(
    logits: Logits,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    results: Statistics,
) -> None:
    if target.numel() == 0:
        return
    tile = _tile(logits)
    statistics_kernel[(triton.cdiv(logits.sizes[0], tile.block_rows),)](
        logits,
        target.contiguous(),
        contiguous(class_weight),
        Statistics(*(values if values.numel() else None for values in results)),  # type: ignore[arg-type]
        ignore_index,
        BLOCK_ROWS=tile.block_rows,
        BLOCK_CLASSES=tile.block_classes,
        num_warps=tile.num_warps,
    )


def _differentiate(
    logits: Logits,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    shift: Tensor,
    grads: Statistics,
    gradient: Tensor,
) -> None:
    """Write the gradient of the outputs."""
    if gradient.numel() == 0:
        return
    upstream = Upstream.of(shift, grads, class_weight)
    tile = _tile(logits)
    num_rows, num_classes, _ = logits.sizes
    grid = triton.cdiv(num_rows, tile.block_rows), triton.cdiv(num_classes, tile.block_classes)
    gradient_kernel[grid](
        logits,
        target.contiguous(),
        contiguous(class_weight),
        upstream,
        gradient,
        (*gradient.stride(), 0)[:3],
        ignore_index,
        BLOCK_ROWS=tile.block_rows,
        BLOCK_CLASSES=tile.block_classes,
        num_warps=tile.num_warps,
    )


def _tile(logits: Logits) -> Tile:
    """The table's entry; few classes leave a program more rows."""
    table = APART if logits.sizes[2] > 1 and logits.strides[1] != 1 else ADJACENT
    tile = table.choose(_triton.architecture(logits.outputs.device))
    classes = min(tile.block_classes, triton.next_power_of_2(logits.sizes[1]))
    rows = min(64, tile.block_rows * tile.block_classes // classes)
    return Tile(max(rows, tile.block_rows), classes, tile.num_warps)
