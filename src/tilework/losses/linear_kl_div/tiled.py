"""The divergence between two linear heads in plain PyTorch, tile by tile of tokens and classes.

Of each head one tile of logits exists at a time, and a few more tiles of what is made of them. The
backward computes the logits again.
"""

from typing import Any

import torch
from torch import Tensor

from tilework._operators import Needed
from tilework.losses._classes.tiles import (
    NEGLIGIBLE,
    Head,
    kept_rows,
    spread,
    tile_width,
)
from tilework.losses.linear_kl_div.common import (
    STUDENT,
    SUMS,
    Divergences,
    Heads,
    divergence_and_statistics,
    likeliest_excess,
    log_mixture,
)


def forward(given: Heads) -> Divergences:
    """See ``Divergences``."""
    return divergence_and_statistics(given, sums, mixture_sums)


def sums(given: Heads) -> Tensor:
    """The sums of ``common.SUMS`` over all classes, shape (6, N)."""
    divergence = given.divergence
    rows, student, teacher = _heads(given)
    kept = len(given.counted) if rows is None else len(rows)
    result = given.student_input.new_zeros(SUMS, kept, dtype=student.dtype)
    tiny = torch.finfo(student.dtype).tiny
    for tokens in student.tokens():
        base, moment = result[4:, tokens]
        p, q = _SumOfExponentials(base), _SumOfExponentials(base)
        weights, others = (q, p) if divergence == "forward" else (p, q)
        for classes in student.classes():
            student_logits = _logits(student, tokens, classes, student.dtype)
            teacher_logits = _logits(teacher, tokens, classes, student.dtype)
            of_weights, of_others = student_logits, teacher_logits
            if divergence == "forward":
                of_weights, of_others = of_others, of_weights
            top, place = of_weights.max(1)
            other = of_others.gather(1, place[:, None])[:, 0]
            moves = top > weights.peak
            if divergence != "jsd":
                moves &= other != -torch.inf
            if divergence != "jsd":
                # Exact where the heads are close, unlike what is between their gaps.
                differences = of_weights - of_others
                old_difference = weights.shift - base
            base.copy_(other.where(moves, base))
            weights.take_(of_weights, top)
            others.take_(of_others, of_others.amax(1))
            if divergence != "jsd":
                difference = weights.shift - base
                differences.sub_(difference[:, None]).masked_fill_(of_weights == -torch.inf, 0)
                # What underflows, here and below, still makes an infinite difference infinite.
                decay = weights.decay.clamp(min=tiny)
                moment.addcmul_(old_difference - difference, weights.total).mul_(decay)
            weights.add_exponentials_()
            others.add_exponentials_()
            if divergence != "jsd":
                moment += differences.mul_(of_weights.clamp_(min=tiny)).sum(1)
        result[:4, tokens] = torch.stack((p.shift, p.total, q.shift, q.total))
    return spread(result, rows, len(given.counted), dim=1)


def mixture_sums(given: Heads, sums: Tensor) -> Tensor:
    """``sum(exp(z - max z) * (log m - log p - pivot))`` of the student's logits, and of the
    teacher's ``sum(exp(z - max z) * (log m - log q))``, shape (2, N)."""
    beta = given.beta
    rows, student, teacher = _heads(given)
    vectors = torch.cat((sums[:4], likeliest_excess(sums, beta)[None]))
    if rows is not None:
        vectors = vectors.index_select(1, rows)
    result = vectors.new_zeros(2, vectors.shape[1])
    for tokens in student.tokens():
        student_shift, student_total, teacher_shift, teacher_total, row_pivot = (
            vector[:, None] for vector in vectors[:, tokens]
        )
        offset = (student_total / teacher_total).log()
        for classes in student.classes():
            student_gaps = _logits(student, tokens, classes, student.dtype).sub_(student_shift)
            teacher_gaps = _logits(teacher, tokens, classes, student.dtype).sub_(teacher_shift)
            ratios = _log_ratios(student_gaps, teacher_gaps, offset)
            excess = log_mixture(-ratios, 1 - beta)  # log m - log q
            result[1, tokens] += excess.mul_(teacher_gaps.exp_()).sum(1)
            excess = log_mixture(ratios, beta).sub_(row_pivot)  # log m - log p
            result[0, tokens] += excess.mul_(student_gaps.exp_()).sum(1)
    return spread(result, rows, len(given.counted), dim=1)


def backward(
    given: Heads, results: Divergences, grads: Any, needed: Needed
) -> dict[str, Tensor | None]:
    """Gradients of the student's input, weight and bias, those that are needed."""
    divergence, beta, statistics = given.divergence, given.beta, results.statistics
    rows, student, teacher = _heads(given)
    scale = grads.value.where(given.counted, 0) / given.temperature
    vectors = torch.cat((scale[None], statistics))
    if divergence == "jsd":
        vectors = torch.cat((vectors, likeliest_excess(statistics, beta)[None]))
    if rows is not None:
        vectors = vectors.index_select(1, rows)

    def gradient(tokens: slice, classes: slice) -> tuple[Tensor, None]:
        scale, student_shift, student_total, teacher_shift, teacher_total, base, mean, *pivot = (
            vector[:, None] for vector in vectors[:, tokens]
        )
        student_gaps = student.outputs(tokens, classes)
        slope = student.cap(student_gaps, need_slope=True)
        teacher_gaps = _logits(teacher, tokens, classes, student.dtype)
        if divergence == "reverse":
            differences = (student_gaps - teacher_gaps).sub_(student_shift - base)
            differences.masked_fill_(student_gaps == -torch.inf, 0).sub_(mean)
        student_gaps.sub_(student_shift)
        teacher_gaps.sub_(teacher_shift)
        if divergence == "forward":
            p = student_gaps.exp_().mul_(scale / student_total)
            grad = p.sub_(teacher_gaps.exp_().mul_(scale / teacher_total))
        elif divergence == "reverse":
            grad = student_gaps.exp_().mul_(scale / student_total).mul_(differences)
        else:
            offset = (student_total / teacher_total).log()
            excess = log_mixture(_log_ratios(student_gaps, teacher_gaps, offset), beta)
            share = (beta - 1) * scale / student_total
            grad = student_gaps.exp_().mul_(share).mul_(excess.sub_(pivot[0]).sub_(mean))
        return grad if slope is None else grad.mul_(slope), None

    grad_hidden, grad_weight, grad_bias = student.gradients(
        [name in needed for name in STUDENT], gradient
    )
    if "student_input" in needed:
        grad_hidden = spread(grad_hidden, rows, len(given.counted), dim=0)
    return dict(zip(STUDENT, (grad_hidden, grad_weight, grad_bias), strict=True))


def _heads(given: Heads) -> tuple[Tensor | None, Head, Head]:
    """Which rows are counted, None for all, and the heads on these, with the same tiles."""
    rows, hidden = kept_rows(~given.counted, given.student_input, given.teacher_input)
    heads = [
        (one, weight, bias, softcap)
        for one, (_, weight, bias, softcap) in zip(
            hidden, (given.student, given.teacher), strict=True
        )
    ]
    width = min(tile_width(len(one), weight) for one, weight, *_ in heads)
    student, teacher = (
        Head(one, weight, bias, softcap, given.temperature, width)
        for one, weight, bias, softcap in heads
    )
    return rows, student, teacher


def _logits(head: Head, tokens: slice, classes: slice, dtype: torch.dtype) -> Tensor:
    logits = head.outputs(tokens, classes)
    head.cap(logits)
    return logits.to(dtype)


class _SumOfExponentials:
    """The sum of the exponentials of rows' logits, in units of the exponential of their maximum."""

    def __init__(self, rows: Tensor) -> None:
        self.total, self.shift = torch.zeros_like(rows), torch.zeros_like(rows)
        self.peak = torch.full_like(rows, -torch.inf)

    def take_(self, logits: Tensor, top: Tensor) -> None:
        """Make gaps of a tile, in place: what its logits exceed the maximum by, up to here."""
        old_peak, self.peak = self.peak, torch.maximum(self.peak, top)
        # A row of -inf alone has no finite maximum to subtract.
        self.shift = self.peak.where(self.peak != -torch.inf, 0)
        self.decay = (old_peak - self.shift).exp_()
        self._gaps = logits.sub_(self.shift[:, None])

    def add_exponentials_(self) -> None:
        """Replace the gaps by their exponentials and add these."""
        self.total = self.total * self.decay + self._gaps.exp_().sum(1)


def _log_ratios(student_gaps: Tensor, teacher_gaps: Tensor, offset: Tensor) -> Tensor:
    """``log q - log p``, from gaps that are clamped in place.

    Where p or q is 0, it stays 0, and the ratio stays finite.
    """
    ratios = teacher_gaps.clamp_(min=NEGLIGIBLE) - student_gaps.clamp_(min=NEGLIGIBLE)
    return ratios.add_(offset)
