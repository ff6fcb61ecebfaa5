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
from tilework._operators import Needed
from tilework._triton import Config, Tuned
from tilework.losses._classes.kernels import (
    MAX_SHARES,
    SHARE,
    Head,
    Panel,
    grouped_tile,
    outputs,
    panel_gradients,
    precision,
    store_panel,
)
from tilework.losses._classes.tiles import NEGLIGIBLE as NEGLIGIBLE_GAP
from tilework.losses.linear_kl_div import common
from tilework.losses.linear_kl_div.common import (
    STUDENT,
    Divergences,
    Heads,
    divergence_and_statistics,
)

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
    head,
    first_row,
    first_column,
    num_rows,
    num_columns,
    inverse_temperature,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """A tile of a head's logits; see ``outputs``."""
    logits = outputs(
        head,
        first_row,
        first_column,
        num_rows,
        num_columns,
        PRECISION,
        INTERPRETED,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_INNER,
    )
    if head.softcap is not None:
        logits = head.softcap * _triton.tanh(logits / head.softcap)
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
    weighting,
    other,
    counted_ptr,
    sums_ptr,
    sizes,
    inverse_temperature,
    share,
    TEACHER_WEIGHTS: tl.constexpr,
    NEED_MOMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """The sums of ``common.SUMS`` over one share of the classes, for one block of tokens.

    Of the logits ``z`` of the weighting head, whose probabilities weight the classes, and ``y`` of
    the other one, each tile moves the largest ``z``, the shift, from ``s`` to ``t``, and ``y`` at
    its place, the base, from ``b`` to ``c``. With ``decay = exp(s - t)``::

        moment = decay * (moment + total * ((s - b) - (t - c)))
                 + sum(exp(z - t) * ((z - y) - (t - c)))
        total = decay * total + sum(exp(z - t))

    The other head has a shift and a total of its own.
    """
    num_tokens, num_classes = sizes
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
            weighting,
            first_row,
            first_column,
            num_tokens - first_row,
            end - first_column,
            inverse_temperature,
            PRECISION,
            INTERPRETED,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_INNER,
        )
        others = _logits(
            other,
            first_row,
            first_column,
            num_tokens - first_row,
            end - first_column,
            inverse_temperature,
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
    student,
    teacher,
    counted_ptr,
    sums_ptr,
    mixture_sums_ptr,
    sizes,
    inverse_temperature,
    beta,
    share,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """The sums of ``tiled.mixture_sums`` over one share of the classes.

    The shifts and totals of both heads over all classes are known, so that what ``log q`` exceeds
    ``log p`` by is too, and with it ``log m - log p`` and ``log m - log q``: the terms of a tile
    are added to those before.
    """
    num_tokens, num_classes = sizes
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
            student,
            first_row,
            first_column,
            num_tokens - first_row,
            end - first_column,
            inverse_temperature,
            PRECISION,
            INTERPRETED,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_INNER,
        )
        teacher_gaps = _logits(
            teacher,
            first_row,
            first_column,
            num_tokens - first_row,
            end - first_column,
            inverse_temperature,
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
    student,
    teacher,
    counted_ptr,
    vectors_ptr,
    vectors_stride,
    panel,
    first_class,
    inverse_temperature,
    beta,
    DIVERGENCE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The gradient of a panel of the student's outputs, whose columns start at ``first_class``.

    The token arguments start at the panel's first token. By the student's logits it is, times the
    gradient of the divergence, ``p - q`` (forward), ``p * ((log p - log q) - mean)`` (reverse), or
    ``(beta - 1) * p * ((log m - log p) - mean)`` (jsd), where the mean is that under ``p``, and
    both it and what it is taken from count from the student's likeliest class.
    """
    num_tokens, num_classes = panel.sizes
    row_block, column_block = grouped_tile(panel.sizes, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    first_row, first_column = row_block * BLOCK_ROWS, column_block * BLOCK_COLUMNS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < num_tokens
    column_mask = columns < num_classes
    counted = row_mask & (tl.load(counted_ptr + rows, mask=row_mask, other=0) != 0)
    student_logits = _logits(
        student,
        first_row,
        first_class + first_column,
        num_tokens - first_row,
        num_classes - first_column,
        inverse_temperature,
        PRECISION,
        INTERPRETED,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_INNER,
    )
    teacher_logits = _logits(
        teacher,
        first_row,
        first_class + first_column,
        num_tokens - first_row,
        num_classes - first_column,
        inverse_temperature,
        PRECISION,
        INTERPRETED,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_INNER,
    )
    slope = inverse_temperature
    if student.softcap is not None:
        tangent = student_logits / inverse_temperature / student.softcap
        slope *= 1 - tangent * tangent
    vectors_ptr += rows
    scale = tl.load(vectors_ptr, mask=counted, other=0.0)[:, None]
    student_shift = tl.load(vectors_ptr + vectors_stride, mask=counted, other=0.0)[:, None]
    student_total = tl.load(vectors_ptr + 2 * vectors_stride, mask=counted, other=1.0)[:, None]
    teacher_shift = tl.load(vectors_ptr + 3 * vectors_stride, mask=counted, other=0.0)[:, None]
    teacher_total = tl.load(vectors_ptr + 4 * vectors_stride, mask=counted, other=1.0)[:, None]
    base = tl.load(vectors_ptr + 5 * vectors_stride, mask=counted, other=0.0)[:, None]
    mean = tl.load(vectors_ptr + 6 * vectors_stride, mask=counted, other=0.0)[:, None]
    gaps = student_logits - student_shift
    grad = tl.exp(gaps) * (scale / student_total)
    if DIVERGENCE == "forward":
        grad -= tl.exp(teacher_logits - teacher_shift) * (scale / teacher_total)
    elif DIVERGENCE == "reverse":
        differences = (student_logits - teacher_logits) - (student_shift - base)
        differences = tl.where(student_logits == float("-inf"), 0.0, differences)
        grad *= differences - mean
    else:
        offset = tl.log(student_total / teacher_total)
        pivot = _log_mixture(tl.maximum(base - teacher_shift, NEGLIGIBLE) + offset, beta)
        teacher_gaps = tl.maximum(teacher_logits - teacher_shift, NEGLIGIBLE)
        ratios = teacher_gaps - tl.maximum(gaps, NEGLIGIBLE)
        excess = _log_mixture(ratios + offset, beta) - pivot
        grad *= (beta - 1) * (excess - mean)
    grad *= slope
    grad = tl.where(counted[:, None] & column_mask[None, :], grad, 0.0)
    store_panel(panel, grad, row_block, column_block, BLOCK_ROWS, BLOCK_COLUMNS)


def forward(given: Heads) -> Divergences:
    """See ``Divergences``."""
    return divergence_and_statistics(given, sums, mixture_sums)


def sums(given: Heads) -> Tensor:
    """The sums of ``common.SUMS`` over all classes, shape (6, N)."""
    num_tokens, num_classes = len(given.student_input), len(given.student_weight)
    share, num_shares = _shares(num_classes)
    shape = num_shares, common.SUMS, num_tokens
    parts = given.student_input.new_empty(shape, dtype=torch.float32)
    if num_tokens == 0:
        return parts[0]
    student, teacher = Head.of(*given.student), Head.of(*given.teacher)
    teacher_weights = given.divergence == "forward"
    weighting, other = (teacher, student) if teacher_weights else (student, teacher)
    config = _config(SUMS, given)
    sums_kernel[(triton.cdiv(num_tokens, config.block_rows), num_shares)](
        weighting,
        other,
        given.counted.contiguous(),
        parts,
        (num_tokens, num_classes),
        1 / given.temperature,
        share,
        TEACHER_WEIGHTS=teacher_weights,
        NEED_MOMENT=given.divergence != "jsd",
        PRECISION=precision(),
        INTERPRETED=_triton.INTERPRETED,
        **config.arguments(),
    )
    return common.merge(parts, given.divergence)


def mixture_sums(given: Heads, sums: Tensor) -> Tensor:
    """See ``tiled.mixture_sums``."""
    num_tokens, num_classes = len(given.student_input), len(given.student_weight)
    share, num_shares = _shares(num_classes)
    parts = given.student_input.new_empty(num_shares, 2, num_tokens, dtype=torch.float32)
    if num_tokens == 0:
        return parts[0]
    config = _config(MIXTURE, given)
    mixture_kernel[(triton.cdiv(num_tokens, config.block_rows), num_shares)](
        Head.of(*given.student),
        Head.of(*given.teacher),
        given.counted.contiguous(),
        sums.contiguous(),
        parts,
        (num_tokens, num_classes),
        1 / given.temperature,
        given.beta,
        share,
        PRECISION=precision(),
        INTERPRETED=_triton.INTERPRETED,
        **config.arguments(),
    )
    return parts.sum(0)


def backward(
    given: Heads, results: Divergences, grads: Any, needed: Needed
) -> dict[str, Tensor | None]:
    """Gradients of the student's input, weight and bias, those that are needed."""
    student, teacher = Head.of(*given.student), Head.of(*given.teacher)
    config = _config(BACKWARD, given)
    vectors = torch.cat((grads.value[None], results.statistics))
    counted = given.counted.contiguous()

    def launch(tokens: slice, classes: slice, panel: Panel) -> None:
        height, width = panel.sizes
        blocks = triton.cdiv(height, config.block_rows) * triton.cdiv(width, config.block_columns)
        backward_kernel[(blocks,)](
            student._replace(input=student.input[tokens]),
            teacher._replace(input=teacher.input[tokens]),
            counted[tokens],
            vectors[:, tokens],
            vectors.stride(0),
            panel,
            classes.start,
            1 / given.temperature,
            given.beta,
            DIVERGENCE=given.divergence,
            PRECISION=precision(),
            INTERPRETED=_triton.INTERPRETED,
            GROUP=8,
            **config.arguments(),
        )

    # The hidden states of positions that are not counted are never read.
    hidden = student.input
    if "student_weight" in needed:
        hidden = hidden.masked_fill(~counted[:, None], 0)
    wanted = [name in needed for name in STUDENT]
    found = panel_gradients(hidden, student.weight, wanted, config.block_rows, launch)
    return dict(zip(STUDENT, found, strict=True))


def _config(table: Tuned[Config], given: Heads) -> Config:
    """Small blocks where one of the heads is of float32."""
    student, teacher = given.student_input, given.teacher_input
    widest = max(student.dtype, teacher.dtype, key=lambda dtype: dtype.itemsize)
    return table.choose(_triton.architecture(student.device), widest)


def _shares(num_classes: int) -> tuple[int, int]:
    """The size of a share of the classes, and how many there are."""
    share = max(SHARE, triton.cdiv(num_classes, MAX_SHARES))
    return share, triton.cdiv(num_classes, share)
