"""The divergence between two linear heads on the GPU: kernels, block sizes and launchers.

A program takes a block of tokens and a share of the classes, and computes the tiles of both heads.
One kernel keeps running sums, a second one, for "jsd", those under the mixture; the shares of the
classes are merged as the parts of heads that are spread over processes are. Backward, a kernel
writes the gradient of a panel of the student's outputs, and the library's matrix products turn it
into gradients. There are no locks and no atomics, and the order of every sum depends on the number
of classes alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilework import _triton
from tilework._triton import Config, Tuned
from tilework.losses._classes.kernels import (
    MAX_SHARES,
    SHARE,
    grouped_tile,
    outputs,
    panel_gradients,
    precision,
    short_strides,
    store_panel,
)
from tilework.losses._classes.tiles import NEGLIGIBLE as NEGLIGIBLE_GAP
from tilework.losses.linear_kl_div import common

# Narrower than for one head, as two tiles take twice the registers.
SUMS = Tuned(
    {
        "sm_80": Config(64, 128, 32, num_warps=8, num_stages=3),
        "sm_90": Config(128, 64, 64, num_warps=8, num_stages=3),
        "sm_100": Config(128, 64, 64, num_warps=8, num_stages=3),
        "gfx942": Config(128, 64, 64, num_warps=8, num_stages=2),
        "gfx942 float32": Config(64, 32, 64, num_warps=4, num_stages=1),
        "float32": Config(64, 32, 32, num_warps=4, num_stages=2),
        "interpreter": Config(32, 32, 32, num_warps=1, num_stages=1),
    },
    otherwise="float32",
)
MIXTURE = SUMS | {
    "sm_80": Config(128, 32, 32, num_warps=8, num_stages=3),
    "sm_90": Config(128, 32, 64, num_warps=8, num_stages=3),
    "sm_100": Config(128, 32, 32, num_warps=8, num_stages=3),
}
BACKWARD = SUMS | {"sm_100 float32": Config(64, 32, 32, num_warps=8, num_stages=2)}
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
NEGLIGIBLE = tl.constexpr(NEGLIGIBLE_GAP)
NEGLIGIBLE_PART = tl.constexpr(common.NEGLIGIBLE_PART)


@triton.jit
def _logits(
    input_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    num_columns,
    features,
    input_stride_row,
    input_stride_feature,
    weight_stride_row,
    weight_stride_feature,
    bias_stride,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """The tile of logits whose first row and column the pointers are at."""
    logits = outputs(
        input_ptr,
        weight_ptr,
        bias_ptr,
        num_rows,
        num_columns,
        features,
        input_stride_row,
        input_stride_feature,
        weight_stride_row,
        weight_stride_feature,
        bias_stride,
        HAS_BIAS,
        PRECISION,
        INTERPRETED,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_INNER,
    )
    if HAS_SOFTCAP:
        logits = softcap * _triton.tanh(logits / softcap)
    return logits * inverse_temperature


@triton.jit
def _log_mixture(gains, share):
    """See ``common.log_mixture``."""
    gains = tl.minimum(gains, NEGLIGIBLE_PART)
    near = share * _triton.expm1(gains)
    far = share * tl.exp(gains) + (1 - share)
    return tl.where(near > -0.5, _triton.log1p(near), tl.log(far))


@triton.jit
def sums_kernel(
    weighting_input_ptr,
    weighting_weight_ptr,
    weighting_bias_ptr,
    weighting_features,
    weighting_input_stride_row,
    weighting_input_stride_feature,
    weighting_weight_stride_row,
    weighting_weight_stride_feature,
    weighting_bias_stride,
    weighting_softcap,
    other_input_ptr,
    other_weight_ptr,
    other_bias_ptr,
    other_features,
    other_input_stride_row,
    other_input_stride_feature,
    other_weight_stride_row,
    other_weight_stride_feature,
    other_bias_stride,
    other_softcap,
    counted_ptr,
    sums_ptr,
    num_tokens,
    num_classes,
    inverse_temperature,
    share,
    WEIGHTING_HAS_BIAS: tl.constexpr,
    WEIGHTING_HAS_SOFTCAP: tl.constexpr,
    OTHER_HAS_BIAS: tl.constexpr,
    OTHER_HAS_SOFTCAP: tl.constexpr,
    TEACHER_WEIGHTS: tl.constexpr,
    NEED_MOMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """``common.SUMS`` over one share of the classes, for one block of tokens.

    The weighting head is the one whose probabilities weight the classes.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    share_index = tl.program_id(1).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    counted = tl.load(counted_ptr + rows, mask=rows < num_tokens, other=0) != 0
    if tl.max(counted.to(tl.int32), 0) == 0:
        return

    peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    shift = tl.zeros((BLOCK_ROWS,), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    other_peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    other_shift = tl.zeros((BLOCK_ROWS,), tl.float32)
    other_total = tl.zeros((BLOCK_ROWS,), tl.float32)
    base = tl.zeros((BLOCK_ROWS,), tl.float32)
    moment = tl.zeros((BLOCK_ROWS,), tl.float32)
    first_column = share_index * share
    end = tl.minimum(first_column + share, num_classes)
    while first_column < end:
        inside = (first_column + tl.arange(0, BLOCK_COLUMNS) < end)[None, :]
        logits = _logits(
            weighting_input_ptr + first_row * weighting_input_stride_row,
            weighting_weight_ptr + first_column * weighting_weight_stride_row,
            weighting_bias_ptr + first_column * weighting_bias_stride
            if WEIGHTING_HAS_BIAS
            else weighting_bias_ptr,
            num_tokens - first_row,
            end - first_column,
            weighting_features,
            weighting_input_stride_row,
            weighting_input_stride_feature,
            weighting_weight_stride_row,
            weighting_weight_stride_feature,
            weighting_bias_stride,
            weighting_softcap,
            inverse_temperature,
            WEIGHTING_HAS_BIAS,
            WEIGHTING_HAS_SOFTCAP,
            PRECISION,
            INTERPRETED,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_INNER,
        )
        others = _logits(
            other_input_ptr + first_row * other_input_stride_row,
            other_weight_ptr + first_column * other_weight_stride_row,
            other_bias_ptr + first_column * other_bias_stride if OTHER_HAS_BIAS else other_bias_ptr,
            num_tokens - first_row,
            end - first_column,
            other_features,
            other_input_stride_row,
            other_input_stride_feature,
            other_weight_stride_row,
            other_weight_stride_feature,
            other_bias_stride,
            other_softcap,
            inverse_temperature,
            OTHER_HAS_BIAS,
            OTHER_HAS_SOFTCAP,
            PRECISION,
            INTERPRETED,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_INNER,
        )
        # Columns past the end repeat the last one, and the first of equal ones counts.
        top = tl.max(logits, 1)
        columns = tl.arange(0, BLOCK_COLUMNS)[None, :]
        place = tl.min(tl.where(logits == top[:, None], columns, BLOCK_COLUMNS), 1)
        at_top = tl.sum(tl.where(columns == place[:, None], others, 0.0), 1)
        moves = top > peak
        if NEED_MOMENT:
            moves = moves & (at_top != float("-inf"))
        new_base = tl.where(moves, at_top, base)

        new_peak = tl.maximum(peak, top)
        # A row of -inf alone has no finite peak to subtract.
        new_shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        gaps = logits - new_shift[:, None]
        exponentials = tl.where(inside, tl.exp(gaps), 0.0)
        decay = tl.exp(peak - new_shift)
        if NEED_MOMENT:
            differences = (logits - others) - (new_shift - new_base)[:, None]
            differences = tl.where(logits == float("-inf"), 0.0, differences)
            # What underflows still makes an infinite difference infinite.
            terms = tl.where(inside, tl.maximum(exponentials, TINY) * differences, 0.0)
            change = (shift - base) - (new_shift - new_base)
            moment = (moment + total * change) * tl.maximum(decay, TINY) + tl.sum(terms, 1)
        total = total * decay + tl.sum(exponentials, 1)
        peak = new_peak
        shift = new_shift
        base = new_base

        new_peak = tl.maximum(other_peak, tl.max(others, 1))
        new_shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        exponentials = tl.where(inside, tl.exp(others - new_shift[:, None]), 0.0)
        other_total = other_total * tl.exp(other_peak - new_shift) + tl.sum(exponentials, 1)
        other_peak = new_peak
        other_shift = new_shift
        first_column += BLOCK_COLUMNS

    sums_ptr += share_index * 6 * num_tokens + rows
    first = 2 * num_tokens if TEACHER_WEIGHTS else 0
    second = 0 if TEACHER_WEIGHTS else 2 * num_tokens
    tl.store(sums_ptr + first, shift, mask=counted)
    tl.store(sums_ptr + first + num_tokens, total, mask=counted)
    tl.store(sums_ptr + second, other_shift, mask=counted)
    tl.store(sums_ptr + second + num_tokens, other_total, mask=counted)
    tl.store(sums_ptr + 4 * num_tokens, base, mask=counted)
    tl.store(sums_ptr + 5 * num_tokens, moment, mask=counted)


@triton.jit
def mixture_kernel(
    student_input_ptr,
    student_weight_ptr,
    student_bias_ptr,
    student_features,
    student_input_stride_row,
    student_input_stride_feature,
    student_weight_stride_row,
    student_weight_stride_feature,
    student_bias_stride,
    student_softcap,
    teacher_input_ptr,
    teacher_weight_ptr,
    teacher_bias_ptr,
    teacher_features,
    teacher_input_stride_row,
    teacher_input_stride_feature,
    teacher_weight_stride_row,
    teacher_weight_stride_feature,
    teacher_bias_stride,
    teacher_softcap,
    counted_ptr,
    sums_ptr,
    mixture_sums_ptr,
    num_tokens,
    num_classes,
    inverse_temperature,
    beta,
    share,
    STUDENT_HAS_BIAS: tl.constexpr,
    STUDENT_HAS_SOFTCAP: tl.constexpr,
    TEACHER_HAS_BIAS: tl.constexpr,
    TEACHER_HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """The sums of ``tiled.mixture_sums`` over one share of the classes."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    share_index = tl.program_id(1).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    counted = tl.load(counted_ptr + rows, mask=rows < num_tokens, other=0) != 0
    if tl.max(counted.to(tl.int32), 0) == 0:
        return

    sums_ptr += rows
    student_shift = tl.load(sums_ptr, mask=counted, other=0.0)
    student_total = tl.load(sums_ptr + num_tokens, mask=counted, other=1.0)
    teacher_shift = tl.load(sums_ptr + 2 * num_tokens, mask=counted, other=0.0)
    teacher_total = tl.load(sums_ptr + 3 * num_tokens, mask=counted, other=1.0)
    base = tl.load(sums_ptr + 4 * num_tokens, mask=counted, other=0.0)
    offset = tl.log(student_total / teacher_total)
    pivot = _log_mixture(tl.maximum(base - teacher_shift, NEGLIGIBLE) + offset, beta)
    student_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    teacher_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    first_column = share_index * share
    end = tl.minimum(first_column + share, num_classes)
    while first_column < end:
        inside = (first_column + tl.arange(0, BLOCK_COLUMNS) < end)[None, :]
        student_gaps = _logits(
            student_input_ptr + first_row * student_input_stride_row,
            student_weight_ptr + first_column * student_weight_stride_row,
            student_bias_ptr + first_column * student_bias_stride
            if STUDENT_HAS_BIAS
            else student_bias_ptr,
            num_tokens - first_row,
            end - first_column,
            student_features,
            student_input_stride_row,
            student_input_stride_feature,
            student_weight_stride_row,
            student_weight_stride_feature,
            student_bias_stride,
            student_softcap,
            inverse_temperature,
            STUDENT_HAS_BIAS,
            STUDENT_HAS_SOFTCAP,
            PRECISION,
            INTERPRETED,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_INNER,
        )
        teacher_gaps = _logits(
            teacher_input_ptr + first_row * teacher_input_stride_row,
            teacher_weight_ptr + first_column * teacher_weight_stride_row,
            teacher_bias_ptr + first_column * teacher_bias_stride
            if TEACHER_HAS_BIAS
            else teacher_bias_ptr,
            num_tokens - first_row,
            end - first_column,
            teacher_features,
            teacher_input_stride_row,
            teacher_input_stride_feature,
            teacher_weight_stride_row,
            teacher_weight_stride_feature,
            teacher_bias_stride,
            teacher_softcap,
            inverse_temperature,
            TEACHER_HAS_BIAS,
            TEACHER_HAS_SOFTCAP,
            PRECISION,
            INTERPRETED,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_INNER,
        )
        student_gaps = tl.maximum(student_gaps - student_shift[:, None], NEGLIGIBLE)
        teacher_gaps = tl.maximum(teacher_gaps - teacher_shift[:, None], NEGLIGIBLE)
        ratios = teacher_gaps - student_gaps + offset[:, None]
        terms = tl.exp(student_gaps) * (_log_mixture(ratios, beta) - pivot[:, None])
        student_sum += tl.sum(tl.where(inside, terms, 0.0), 1)
        terms = tl.exp(teacher_gaps) * _log_mixture(-ratios, 1 - beta)
        teacher_sum += tl.sum(tl.where(inside, terms, 0.0), 1)
        first_column += BLOCK_COLUMNS
    mixture_sums_ptr += share_index * 2 * num_tokens + rows
    tl.store(mixture_sums_ptr, student_sum, mask=counted)
    tl.store(mixture_sums_ptr + num_tokens, teacher_sum, mask=counted)


@triton.jit
def backward_kernel(
    student_input_ptr,
    student_weight_ptr,
    student_bias_ptr,
    student_features,
    student_input_stride_row,
    student_input_stride_feature,
    student_weight_stride_row,
    student_weight_stride_feature,
    student_bias_stride,
    student_softcap,
    teacher_input_ptr,
    teacher_weight_ptr,
    teacher_bias_ptr,
    teacher_features,
    teacher_input_stride_row,
    teacher_input_stride_feature,
    teacher_weight_stride_row,
    teacher_weight_stride_feature,
    teacher_bias_stride,
    teacher_softcap,
    counted_ptr,
    vectors_ptr,
    vectors_stride,
    panel_ptr,
    column_sum_ptr,
    num_tokens,
    first_class,
    num_classes,
    inverse_temperature,
    beta,
    STUDENT_HAS_BIAS: tl.constexpr,
    STUDENT_HAS_SOFTCAP: tl.constexpr,
    TEACHER_HAS_BIAS: tl.constexpr,
    TEACHER_HAS_SOFTCAP: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    NEED_COLUMN_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The gradient of a panel of the student's outputs.

    It has ``num_tokens`` rows, and ``num_classes`` columns from ``first_class``. The token
    arguments start at the panel's first token.
    """
    row_block, column_block = grouped_tile(
        num_tokens, num_classes, BLOCK_ROWS, BLOCK_COLUMNS, GROUP
    )
    first_row, first_column = row_block * BLOCK_ROWS, column_block * BLOCK_COLUMNS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < num_tokens
    column_mask = columns < num_classes
    counted = row_mask & (tl.load(counted_ptr + rows, mask=row_mask, other=0) != 0)
    student = _logits(
        student_input_ptr + first_row * student_input_stride_row,
        student_weight_ptr + (first_class + first_column) * student_weight_stride_row,
        student_bias_ptr + (first_class + first_column) * student_bias_stride
        if STUDENT_HAS_BIAS
        else student_bias_ptr,
        num_tokens - first_row,
        num_classes - first_column,
        student_features,
        student_input_stride_row,
        student_input_stride_feature,
        student_weight_stride_row,
        student_weight_stride_feature,
        student_bias_stride,
        student_softcap,
        inverse_temperature,
        STUDENT_HAS_BIAS,
        STUDENT_HAS_SOFTCAP,
        PRECISION,
        INTERPRETED,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_INNER,
    )
    teacher = _logits(
        teacher_input_ptr + first_row * teacher_input_stride_row,
        teacher_weight_ptr + (first_class + first_column) * teacher_weight_stride_row,
        teacher_bias_ptr + (first_class + first_column) * teacher_bias_stride
        if TEACHER_HAS_BIAS
        else teacher_bias_ptr,
        num_tokens - first_row,
        num_classes - first_column,
        teacher_features,
        teacher_input_stride_row,
        teacher_input_stride_feature,
        teacher_weight_stride_row,
        teacher_weight_stride_feature,
        teacher_bias_stride,
        teacher_softcap,
        inverse_temperature,
        TEACHER_HAS_BIAS,
        TEACHER_HAS_SOFTCAP,
        PRECISION,
        INTERPRETED,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_INNER,
    )
    slope = inverse_temperature
    if STUDENT_HAS_SOFTCAP:
        tangent = student / inverse_temperature / student_softcap
        slope *= 1 - tangent * tangent
    vectors_ptr += rows
    scale = tl.load(vectors_ptr, mask=counted, other=0.0)[:, None]
    student_shift = tl.load(vectors_ptr + vectors_stride, mask=counted, other=0.0)[:, None]
    student_total = tl.load(vectors_ptr + 2 * vectors_stride, mask=counted, other=1.0)[:, None]
    teacher_shift = tl.load(vectors_ptr + 3 * vectors_stride, mask=counted, other=0.0)[:, None]
    teacher_total = tl.load(vectors_ptr + 4 * vectors_stride, mask=counted, other=1.0)[:, None]
    base = tl.load(vectors_ptr + 5 * vectors_stride, mask=counted, other=0.0)[:, None]
    mean = tl.load(vectors_ptr + 6 * vectors_stride, mask=counted, other=0.0)[:, None]
    gaps = student - student_shift
    grad = tl.exp(gaps) * (scale / student_total)
    if DIVERGENCE == "forward":
        grad -= tl.exp(teacher - teacher_shift) * (scale / teacher_total)
    elif DIVERGENCE == "reverse":
        differences = (student - teacher) - (student_shift - base)
        differences = tl.where(student == float("-inf"), 0.0, differences)
        grad *= differences - mean
    else:
        offset = tl.log(student_total / teacher_total)
        pivot = _log_mixture(tl.maximum(base - teacher_shift, NEGLIGIBLE) + offset, beta)
        ratios = tl.maximum(teacher - teacher_shift, NEGLIGIBLE) - tl.maximum(gaps, NEGLIGIBLE)
        excess = _log_mixture(ratios + offset, beta) - pivot
        grad *= (beta - 1) * (excess - mean)
    grad *= slope
    grad = tl.where(counted[:, None] & column_mask[None, :], grad, 0.0)
    store_panel(
        panel_ptr,
        column_sum_ptr,
        grad,
        row_block,
        column_block,
        num_tokens,
        num_classes,
        NEED_COLUMN_SUM,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
    )


def sums(
    student_input: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    counted: Tensor,
    student_softcap: float | None,
    teacher_softcap: float | None,
    temperature: float,
    divergence: str,
) -> Tensor:
    """The sums of ``common.SUMS`` over all classes, shape (6, N)."""
    num_tokens, num_classes = len(student_input), len(student_weight)
    share, num_shares = _shares(num_classes)
    parts = student_input.new_empty(num_shares, 6, num_tokens, dtype=torch.float32)
    if num_tokens == 0:
        return parts[0]
    student = student_input, student_weight, student_bias, student_softcap
    teacher = teacher_input, teacher_weight, teacher_bias, teacher_softcap
    teacher_weights = divergence == "forward"
    weighting, other = (teacher, student) if teacher_weights else (student, teacher)
    config = _config(SUMS, student_input, teacher_input)
    sums_kernel[(triton.cdiv(num_tokens, config.block_rows), num_shares)](
        *_arguments(*weighting),
        *_arguments(*other),
        counted.contiguous(),
        parts,
        num_tokens,
        num_classes,
        1 / temperature,
        share,
        **_flags("WEIGHTING", weighting),
        **_flags("OTHER", other),
        TEACHER_WEIGHTS=teacher_weights,
        NEED_MOMENT=divergence != "jsd",
        PRECISION=precision(),
        INTERPRETED=_triton.INTERPRETED,
        **config.arguments(),
    )
    return common.merge(parts, divergence)


def mixture_sums(
    student_input: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    counted: Tensor,
    sums: Tensor,
    student_softcap: float | None,
    teacher_softcap: float | None,
    temperature: float,
    beta: float,
) -> Tensor:
    """See ``tiled.mixture_sums``."""
    num_tokens, num_classes = len(student_input), len(student_weight)
    share, num_shares = _shares(num_classes)
    parts = student_input.new_empty(num_shares, 2, num_tokens, dtype=torch.float32)
    if num_tokens == 0:
        return parts[0]
    student = student_input, student_weight, student_bias, student_softcap
    teacher = teacher_input, teacher_weight, teacher_bias, teacher_softcap
    config = _config(MIXTURE, student_input, teacher_input)
    mixture_kernel[(triton.cdiv(num_tokens, config.block_rows), num_shares)](
        *_arguments(*student),
        *_arguments(*teacher),
        counted.contiguous(),
        sums.contiguous(),
        parts,
        num_tokens,
        num_classes,
        1 / temperature,
        beta,
        share,
        **_flags("STUDENT", student),
        **_flags("TEACHER", teacher),
        PRECISION=precision(),
        INTERPRETED=_triton.INTERPRETED,
        **config.arguments(),
    )
    return parts.sum(0)


def backward(
    grad_divergence: Tensor,
    student_input: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    counted: Tensor,
    statistics: Tensor,
    student_softcap: float | None,
    teacher_softcap: float | None,
    temperature: float,
    divergence: str,
    beta: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the student's input, weight and bias; empty for each that is not needed."""
    student = student_input, student_weight, student_bias, student_softcap
    teacher = teacher_input, teacher_weight, teacher_bias, teacher_softcap
    student_input, student_weight, student_bias, *student_numbers = _arguments(*student)
    teacher_input, *teacher_arguments = _arguments(*teacher)
    config = _config(BACKWARD, student_input, teacher_input)
    vectors = torch.cat((grad_divergence[None], statistics))
    counted = counted.contiguous()

    def launch(tokens: slice, classes: slice, panel: Tensor, column_sums: Tensor) -> None:
        height, width = panel.shape
        blocks = triton.cdiv(height, config.block_rows) * triton.cdiv(width, config.block_columns)
        backward_kernel[(blocks,)](
            student_input[tokens],
            student_weight,
            student_bias,
            *student_numbers,
            teacher_input[tokens],
            *teacher_arguments,
            counted[tokens],
            vectors[:, tokens],
            vectors.stride(0),
            panel,
            column_sums,
            height,
            classes.start,
            width,
            1 / temperature,
            beta,
            **_flags("STUDENT", student),
            **_flags("TEACHER", teacher),
            DIVERGENCE=divergence,
            NEED_COLUMN_SUM=needed[2],
            PRECISION=precision(),
            INTERPRETED=_triton.INTERPRETED,
            GROUP=8,
            **config.arguments(),
        )

    # The hidden states of positions that are not counted are never read.
    hidden = student_input.masked_fill(~counted[:, None], 0) if needed[1] else student_input
    return panel_gradients(hidden, student_weight, needed, config.block_rows, launch)


_HeadTensors = tuple[Tensor, Tensor, Tensor | None, float | None]


def _arguments(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> tuple[Any, ...]:
    """The arguments of a head, in the order of the kernels."""
    hidden, weight = short_strides(hidden), short_strides(weight)
    strides = *hidden.stride(), *weight.stride(), 0 if bias is None else bias.stride(0)
    return hidden, weight, bias, hidden.shape[1], *strides, softcap or 0.0


def _flags(name: str, head: _HeadTensors) -> dict[str, bool]:
    return {f"{name}_HAS_BIAS": head[2] is not None, f"{name}_HAS_SOFTCAP": head[3] is not None}


def _config(table: Tuned[Config], student: Tensor, teacher: Tensor) -> Config:
    """Small blocks where one of the heads is of float32."""
    widest = max(student.dtype, teacher.dtype, key=lambda dtype: dtype.itemsize)
    return table.choose(_triton.architecture(student.device), widest)


def _shares(num_classes: int) -> tuple[int, int]:
    """The size of a share of the classes, and how many there are."""
    share = max(SHARE, triton.cdiv(num_classes, MAX_SHARES))
    return share, triton.cdiv(num_classes, share)
