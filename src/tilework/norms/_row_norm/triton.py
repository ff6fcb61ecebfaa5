"""RMS and layer normalization on the GPU: kernels, block sizes and launchers.

A row that fits the registers is read once. A longer one is read twice, the second time from its
end, where the cache still holds it. Gradients of weight and bias: each program sums its rows in
float32, and torch adds the sums of the programs. There are no locks and no atomics.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilework import _triton
from tilework._operators import HALF
from tilework._triton import Tuned
from tilework.norms._row_norm.common import Backward, Gradients, Normalized, RowNorm


class Limits(NamedTuple):
    """What the constants of a launch follow from.

    Attributes:
        held: The longest row that a forward holds in registers; the most sums of columns that a
            backward does.
        short: Elements of a tile of short rows.
        long: Elements of a part of a long row.
    """

    held: int
    short: int
    long: int


FORWARD = Tuned(
    {"sm_80": Limits(16384, 4096, 4096), "interpreter": Limits(64, 64, 64)}, otherwise="sm_80"
)
BACKWARD = FORWARD | {"sm_100": Limits(8192, 4096, 4096)}
# Threads of a warp; a multiprocessor takes this many threads of a backward.
LANES = {"gfx942": 64, "interpreter": 1024}
USUAL_LANES = 32
THREADS = 1024


class Rows(NamedTuple):
    """A tensor whose leading dimensions count as three, with their strides; rows are dense."""

    pointer: Tensor
    strides: tuple[int, int, int]


@triton.jit
def _starts(tensor, rows, sizes):
    """Where rows begin in a tensor."""
    middle, last = sizes
    outer = rows // last
    places = (outer // middle) * tensor.strides[0] + (outer % middle) * tensor.strides[1]
    return places + (rows % last) * tensor.strides[2]


@triton.jit
def _sums(input, residual, starts, columns, mask):
    """A tile of the rows to normalize."""
    total = tl.load(input.pointer + starts[0][:, None] + columns[None, :], mask=mask, other=0.0)
    total = total.to(tl.float32)
    if residual is not None:
        offsets = starts[1][:, None] + columns[None, :]
        total += tl.load(residual.pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _rounded(total, total_ptr):
    """The rows as the backward will read them."""
    return total.to(total_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _merge(mean, squares, total, mask, seen, count):
    """Mean and sum of squared deviations of ``seen`` columns and a tile of ``count`` more.

    Merged as by Chan, Golub and LeVeque.
    """
    tile_mean = tl.sum(total, 1) / count
    deviation = tl.where(mask, total - tile_mean[:, None], 0.0)
    step = tile_mean - mean
    share = count / (seen + count)
    squares += tl.sum(deviation * deviation, 1) + step * step * (seen * share)
    return mean + step * share, squares


@triton.jit
def _gain(weight_ptr, columns, mask, WEIGHT_OFFSET: tl.constexpr):
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return (weight + WEIGHT_OFFSET)[None, :]


@triton.jit
def _store_output(
    outputs,
    parameters,
    total,
    statistics,
    offsets,
    columns,
    mask,
    column_mask,
    WEIGHT_OFFSET: tl.constexpr,
    CENTERED: tl.constexpr,
):
    output_ptr, total_ptr = outputs
    weight_ptr, bias_ptr = parameters
    mean, rstd = statistics
    if total_ptr is not None:
        tl.store(total_ptr + offsets, total.to(total_ptr.dtype.element_ty), mask=mask)
    output = (total - mean[:, None] if CENTERED else total) * rstd[:, None]
    if weight_ptr is not None:
        output *= _gain(weight_ptr, columns, column_mask, WEIGHT_OFFSET)
    if bias_ptr is not None:
        output += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(output_ptr + offsets, output.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    input,
    residual,
    weight_ptr,
    bias_ptr,
    output_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    sizes,
    leading,
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    CENTERED: tl.constexpr,
    ROUNDED: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A block of rows of one head: every ``num_programs(1)``-th of all rows.

    ``sizes`` are rows, features and measured features, ``leading`` the sizes of the second and the
    third leading dimension. A held row is one tile. Of a longer one the tiles are read twice: first
    they are merged to a mean and squared deviations, or their squares are added; then each gives
    ``output = (total - mean) * rstd * gain + bias``.

    ``ROUNDED`` saves the statistics of the rounded sum, from which the backward starts.
    """
    num_rows, num_features, num_measured = sizes
    head = tl.program_id(1).to(tl.int64)
    places = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = places < num_rows
    rows = places * tl.num_programs(1) + head
    input_starts = _starts(input, rows, leading)
    residual_starts = input_starts
    if residual is not None:
        residual_starts = _starts(residual, rows, leading)
    starts = input_starts, residual_starts
    output_starts = rows * num_features
    if weight_ptr is not None:
        weight_ptr += head * num_features
    outputs, parameters = (output_ptr, total_ptr), (weight_ptr, bias_ptr)

    block = tl.arange(0, BLOCK_COLUMNS)
    mean = tl.zeros((BLOCK_ROWS,), tl.float32)
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    saved_mean = mean
    saved_squares = squares
    if HELD:
        column_mask = block < num_features
        mask = row_mask[:, None] & column_mask[None, :]
        total = _sums(input, residual, starts, block, mask)
        if CENTERED:
            mean, squares = _merge(mean, squares, total, mask, 0, num_features)
            if ROUNDED:
                saved = _rounded(total, total_ptr)
                saved_mean, saved_squares = _merge(
                    saved_mean, saved_squares, saved, mask, 0, num_features
                )
        else:
            measured = tl.where((block < num_measured)[None, :], total, 0.0)
            squares = tl.sum(measured * measured, 1)
        rstd = tl.rsqrt(squares / num_measured + EPS)
        _store_output(
            outputs,
            parameters,
            total,
            (mean, rstd),
            output_starts[:, None] + block[None, :],
            block,
            mask,
            column_mask,
            WEIGHT_OFFSET,
            CENTERED,
        )
    else:
        if CENTERED:
            for start in range(0, num_features, BLOCK_COLUMNS):
                columns = start + block
                mask = row_mask[:, None] & (columns < num_features)[None, :]
                total = _sums(input, residual, starts, columns, mask)
                count = tl.minimum(num_features - start, BLOCK_COLUMNS)
                mean, squares = _merge(mean, squares, total, mask, start, count)
                if ROUNDED:
                    saved = _rounded(total, total_ptr)
                    saved_mean, saved_squares = _merge(
                        saved_mean, saved_squares, saved, mask, start, count
                    )
        else:
            products = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for start in range(0, num_measured, BLOCK_COLUMNS):
                columns = start + block
                mask = row_mask[:, None] & (columns < num_measured)[None, :]
                total = _sums(input, residual, starts, columns, mask)
                products += total * total
            squares = tl.sum(products, 1)
        rstd = tl.rsqrt(squares / num_measured + EPS)
        num_blocks = tl.cdiv(num_features, BLOCK_COLUMNS)
        for index in range(0, num_blocks):
            columns = (num_blocks - 1 - index) * BLOCK_COLUMNS + block
            column_mask = columns < num_features
            mask = row_mask[:, None] & column_mask[None, :]
            total = _sums(input, residual, starts, columns, mask)
            _store_output(
                outputs,
                parameters,
                total,
                (mean, rstd),
                output_starts[:, None] + columns[None, :],
                columns,
                mask,
                column_mask,
                WEIGHT_OFFSET,
                CENTERED,
            )
    if ROUNDED:
        mean = saved_mean
        rstd = tl.rsqrt(saved_squares / num_measured + EPS)
    if CENTERED:
        tl.store(mean_ptr + rows, mean, mask=row_mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)


@triton.jit
def _x_hat_and_wdy(
    total,
    grad_output,
    weight_ptr,
    starts,
    statistics,
    columns,
    mask,
    column_mask,
    WEIGHT_OFFSET: tl.constexpr,
    CENTERED: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Tiles of the normalized rows, of the gradient after the weight, and of that before it."""
    mean, rstd = statistics
    total_ptrs = total.pointer + starts[0][:, None] + columns[None, :]
    rows = tl.load(total_ptrs, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
    grad_ptrs = grad_output.pointer + starts[1][:, None] + columns[None, :]
    grad = tl.load(grad_ptrs, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
    x_hat = (rows - mean[:, None] if CENTERED else rows) * rstd[:, None]
    wdy = grad
    if weight_ptr is not None:
        wdy = grad * _gain(weight_ptr, columns, column_mask, WEIGHT_OFFSET)
    return x_hat, grad, wdy


@triton.jit
def _store_grad(
    grad_input_ptr,
    grad_total,
    x_hat,
    wdy,
    means,
    rstd,
    output_offsets,
    grad_total_starts,
    columns,
    num_measured,
    mask,
    CENTERED: tl.constexpr,
):
    c1, c2 = means
    result = wdy - tl.where((columns < num_measured)[None, :], x_hat * c1[:, None], 0.0)
    if CENTERED:
        result -= c2[:, None]
    result *= rstd[:, None]
    if grad_total is not None:
        offsets = grad_total_starts[:, None] + columns[None, :]
        result += tl.load(grad_total.pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_input_ptr + output_offsets, result.to(grad_input_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad_output,
    grad_total,
    total,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    grad_input_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    sizes,
    leading,
    WEIGHT_OFFSET: tl.constexpr,
    CENTERED: tl.constexpr,
    HELD: tl.constexpr,
    REREAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Every ``num_programs(0)``-th block of the rows of one head; sizes as in the forward.

    With ``x_hat = (total - mean) * rstd`` and ``wdy = grad_output * gain``, each row has::

        c1 = sum(wdy * x_hat) / num_measured
        c2 = sum(wdy) / num_features
        grad_input = rstd * (wdy - c1 * x_hat - c2) + grad_total

    without ``c1`` for features that are not measured, and without ``c2`` if no mean is subtracted.
    The tiles of a row that is not held are read twice, for these sums first. Over all of its rows,
    a program adds up ``grad_output * x_hat`` for the weight and ``grad_output`` for the bias, whose
    gradients have a row for each program: in registers if rows are held, otherwise in memory.
    """
    num_rows, num_features, num_measured = sizes
    program = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(1)
    if weight_ptr is not None:
        weight_ptr += head * num_features
    partial = (head * tl.num_programs(0) + program) * num_features
    if grad_weight_ptr is not None:
        grad_weight_ptr += partial
    if grad_bias_ptr is not None:
        grad_bias_ptr += partial

    block = tl.arange(0, BLOCK_COLUMNS)
    weight_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    bias_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for tile in range(program, tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0)):
        places = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        row_mask = places < num_rows
        rows = places * num_heads + head
        starts = _starts(total, rows, leading), _starts(grad_output, rows, leading)
        grad_total_starts = rows
        if grad_total is not None:
            grad_total_starts = _starts(grad_total, rows, leading)
        output_starts = rows * num_features
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)
        mean = rstd
        if CENTERED:
            mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)
        c2 = rstd
        if HELD:
            column_mask = block < num_features
            mask = row_mask[:, None] & column_mask[None, :]
            x_hat, grad, wdy = _x_hat_and_wdy(
                total,
                grad_output,
                weight_ptr,
                starts,
                (mean, rstd),
                block,
                mask,
                column_mask,
                WEIGHT_OFFSET,
                CENTERED,
                "evict_last" if REREAD else "evict_first",
            )
            c1 = tl.sum(wdy * x_hat, 1) / num_measured
            if CENTERED:
                c2 = tl.sum(wdy, 1) / num_features
            if REREAD:
                x_hat, grad, wdy = _x_hat_and_wdy(
                    total,
                    grad_output,
                    weight_ptr,
                    starts,
                    (mean, rstd),
                    block,
                    mask,
                    column_mask,
                    WEIGHT_OFFSET,
                    CENTERED,
                    "evict_first",
                )
            if grad_weight_ptr is not None:
                weight_sum += grad * x_hat
            if grad_bias_ptr is not None:
                bias_sum += grad
            if grad_input_ptr is not None:
                _store_grad(
                    grad_input_ptr,
                    grad_total,
                    x_hat,
                    wdy,
                    (c1, c2),
                    rstd,
                    output_starts[:, None] + block[None, :],
                    grad_total_starts,
                    block,
                    num_measured,
                    mask,
                    CENTERED,
                )
        else:
            c1 = rstd
            if grad_input_ptr is not None:
                c1_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
                c2_sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
                for start in range(0, num_features, BLOCK_COLUMNS):
                    columns = start + block
                    column_mask = columns < num_features
                    mask = row_mask[:, None] & column_mask[None, :]
                    x_hat, grad, wdy = _x_hat_and_wdy(
                        total,
                        grad_output,
                        weight_ptr,
                        starts,
                        (mean, rstd),
                        columns,
                        mask,
                        column_mask,
                        WEIGHT_OFFSET,
                        CENTERED,
                        "evict_last",
                    )
                    c1_sums += wdy * x_hat
                    if CENTERED:
                        c2_sums += wdy
                c1 = tl.sum(c1_sums, 1) / num_measured
                if CENTERED:
                    c2 = tl.sum(c2_sums, 1) / num_features
            num_blocks = tl.cdiv(num_features, BLOCK_COLUMNS)
            for index in range(0, num_blocks):
                columns = (num_blocks - 1 - index) * BLOCK_COLUMNS + block
                column_mask = columns < num_features
                mask = row_mask[:, None] & column_mask[None, :]
                x_hat, grad, wdy = _x_hat_and_wdy(
                    total,
                    grad_output,
                    weight_ptr,
                    starts,
                    (mean, rstd),
                    columns,
                    mask,
                    column_mask,
                    WEIGHT_OFFSET,
                    CENTERED,
                    "evict_first",
                )
                # The first tile of a program finds nothing to add to.
                seen = column_mask & (tile != program)
                if grad_weight_ptr is not None:
                    earlier = tl.load(grad_weight_ptr + columns, mask=seen, other=0.0)
                    summed = earlier + tl.sum(grad * x_hat, 0)
                    tl.store(grad_weight_ptr + columns, summed, mask=column_mask)
                if grad_bias_ptr is not None:
                    earlier = tl.load(grad_bias_ptr + columns, mask=seen, other=0.0)
                    summed = earlier + tl.sum(grad, 0)
                    tl.store(grad_bias_ptr + columns, summed, mask=column_mask)
                if grad_input_ptr is not None:
                    _store_grad(
                        grad_input_ptr,
                        grad_total,
                        x_hat,
                        wdy,
                        (c1, c2),
                        rstd,
                        output_starts[:, None] + columns[None, :],
                        grad_total_starts,
                        columns,
                        num_measured,
                        mask,
                        CENTERED,
                    )
            # Another thread may add to these sums in the next tile.
            tl.debug_barrier()
    if HELD:
        column_mask = block < num_features
        if grad_weight_ptr is not None:
            tl.store(grad_weight_ptr + block, tl.sum(weight_sum, 0), mask=column_mask)
        if grad_bias_ptr is not None:
            tl.store(grad_bias_ptr + block, tl.sum(bias_sum, 0), mask=column_mask)


def choose_config(
    arch: str, dtype: torch.dtype, num_features: int, num_sums: int | None = None
) -> dict[str, Any]:
    """The constants of a launch; ``num_sums`` are the columns' sums of a backward."""
    table = FORWARD if num_sums is None else BACKWARD
    return _constants(table.choose(arch), arch, dtype, num_features, num_sums)


@functools.cache
def _constants(
    limits: Limits, arch: str, dtype: torch.dtype, num_features: int, num_sums: int | None
) -> dict[str, Any]:
    backward = num_sums is not None
    # Wide numbers take more registers on their way to and from memory.
    size = dtype.itemsize // 2 if backward else 1
    columns = triton.next_power_of_2(num_features)
    held = columns * (num_sums or 1) * size <= limits.held
    rows = 1
    if held:
        rows = max(1, min(64, limits.short // size // columns))
    else:
        if backward:
            # Some rows at a time make fewer additions to the sums in memory.
            rows = max(1, min(4, 65536 // columns))
        columns = (limits.long // 2 if backward else limits.long) // rows // size
    # A wide row is read again, from the cache, rather than held beside the sums.
    reread = backward and held and columns * size > limits.short // 2
    thread = 8 if backward and not reread else 32 if held and not backward else 16  # elements
    lanes = LANES.get(arch, USUAL_LANES)
    constants = {
        "HELD": held,
        "BLOCK_ROWS": rows,
        "BLOCK_COLUMNS": columns,
        "num_warps": max(1, min(THREADS // lanes, rows * columns // (lanes * thread))),
    }
    if backward:
        constants["REREAD"] = reread
    return constants


def forward(given: RowNorm) -> Normalized:
    """See ``RowNorm``."""
    input, residual, weight, bias = given.input, given.residual, given.weight, given.bias
    dims, centered = given.dims, given.centered
    shape = input.shape[:-dims]
    num_features = input.shape[-dims:].numel()
    output = input.new_empty(input.shape)
    total = input.new_empty(0 if residual is None else input.shape, dtype=given.total_dtype)
    mean = input.new_empty(shape if centered else 0, dtype=torch.float32)
    rstd = input.new_empty(shape, dtype=torch.float32)
    if input.numel() == 0:
        return Normalized(output, total, mean.zero_(), rstd.zero_())
    rows, leading = _rows(dims, input, residual)
    num_heads, num_rows = _heads(rstd.numel(), weight, dims)
    config = choose_config(_triton.architecture(input.device), input.dtype, num_features)
    forward_kernel[(triton.cdiv(num_rows, config["BLOCK_ROWS"]), num_heads)](
        *rows,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        output,
        None if residual is None else total,
        mean if centered else None,
        rstd,
        (num_rows, num_features, given.num_measured),
        leading,
        EPS=given.eps,
        WEIGHT_OFFSET=given.weight_offset,
        CENTERED=centered,
        # Without the mean, the difference is within the rounding of the gradient.
        ROUNDED=centered and residual is not None and total.dtype in HALF,
        **config,
    )
    return Normalized(output, total, mean, rstd)


def backward(given: Backward) -> Gradients:
    """See ``Backward``."""
    total, weight, dims = given.total, given.weight, given.dims
    parameters = weight, given.bias
    need_total, *need_parameters = given.needed
    grad_rows = total.new_empty(total.shape if need_total else 0, dtype=given.dtype)
    if total.numel() == 0:
        of_parameters = (
            torch.zeros_like(parameter) if need and parameter is not None else total.new_empty(0)
            for parameter, need in zip(parameters, need_parameters, strict=True)
        )
        return Gradients(grad_rows, *of_parameters)
    num_features = total.shape[-dims:].numel()
    rows, leading = _rows(dims, given.grad_output, given.grad_total, total)
    num_heads, num_rows = _heads(given.rstd.numel(), weight, dims)
    arch = _triton.architecture(total.device)
    config = choose_config(arch, total.dtype, num_features, sum(need_parameters))
    num_programs = triton.cdiv(num_rows, config["BLOCK_ROWS"])
    if any(need_parameters):
        threads = config["num_warps"] * LANES.get(arch, USUAL_LANES)
        most = THREADS // threads * _triton.multiprocessors(total.device)
        num_programs = min(num_programs, max(1, most // num_heads))
    size = num_heads, num_programs, num_features
    partials = [
        total.new_empty(size, dtype=torch.float32) if need else None for need in need_parameters
    ]
    backward_kernel[(num_programs, num_heads)](
        *rows,
        None if weight is None else weight.contiguous(),
        given.mean.contiguous() if given.centered else None,
        given.rstd.contiguous(),
        grad_rows if need_total else None,
        *partials,
        (num_rows, num_features, given.num_measured),
        leading,
        WEIGHT_OFFSET=given.weight_offset,
        CENTERED=given.centered,
        **config,
    )
    of_parameters = (
        total.new_empty(0)
        if partial is None or parameter is None
        else partial.sum(1).view(parameter.shape).to(parameter.dtype)
        for partial, parameter in zip(partials, parameters, strict=True)
    )
    return Gradients(grad_rows, *of_parameters)


def _heads(num_rows: int, weight: Tensor | None, dims: int) -> tuple[int, int]:
    """The heads that have a weight of their own, and the rows of each."""
    num_heads = 1 if weight is None or weight.dim() == dims else weight.shape[0]
    return num_heads, num_rows // max(1, num_heads)


def _rows(dims: int, *tensors: Tensor | None) -> tuple[list[Rows | None], tuple[int, int]]:
    """Count the leading dimensions of tensors of one shape as three, so that rows can be found.

    Returns the tensors, copied where that cannot be done or their rows are not dense, and the sizes
    of the second and the third dimension.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if all(tensor.is_contiguous() for tensor in given):
        contiguous = given[0].shape[-dims:].numel(), 0, 0
        return [None if t is None else Rows(t, contiguous) for t in tensors], (1, 1)
    leading = given[0].dim() - dims
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, *strides in zip(
        given[0].shape[:leading], *(tensor.stride() for tensor in given), strict=False
    ):
        if size == 1:
            continue
        if merged and merged[-1][1] == tuple(size * stride for stride in strides):
            merged[-1] = (merged[-1][0] * size, tuple(strides))
        else:
            merged.append((size, tuple(strides)))
    dense = all(tensor[(0,) * leading].is_contiguous() for tensor in given if tensor.numel())
    if not dense or len(merged) > 3:
        return _rows(dims, *(None if t is None else t.contiguous() for t in tensors))
    merged += [(1, (0,) * len(given))] * (3 - len(merged))
    by_tensor = iter(zip(*(strides for _, strides in merged), strict=True))
    rows = [None if t is None else Rows(t, next(by_tensor)) for t in tensors]
    return rows, (merged[1][0], merged[2][0])
