"""The divergence between two linear heads in plain PyTorch, tile by tile of tokens and classes.

Of each head one tile of logits exists at a time, and a few more tiles of what is made of them. The
backward computes the logits again.
"""

import torch
from torch import Tensor

from tilework.losses.linear_cross_entropy.shared import (
    NEGLIGIBLE,
    Head,
    kept_rows,
    spread,
    tile_width,
)

# A part that the other exceeds by more, in logarithms, vanishes beside it in every dtype.
NEGLIGIBLE_PART = 80.0


def forward(
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
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Return the divergence of each row, 0 for those that are not counted, and its statistics.

    These are ``max z`` and ``sum(exp(z - max z))`` of the student's logits, the same of the
    teacher's, and the mean under p of what ``z - max z`` of the student exceeds that of the teacher
    by (reverse), or of ``log m - log p`` (jsd), with a correction of its last digits.
    """
    rows, (student_hidden, teacher_hidden) = kept_rows(~counted, student_input, teacher_input)
    student, teacher = _heads(
        (student_hidden, student_weight, student_bias, student_softcap),
        (teacher_hidden, teacher_weight, teacher_bias, teacher_softcap),
        temperature,
    )
    divergences = student_hidden.new_empty(len(student_hidden), dtype=student.dtype)
    statistics = divergences.new_empty(6, len(student_hidden))
    tiny = torch.finfo(student.dtype).tiny
    for tokens in student.tokens():
        p, q = _SumOfExponentials(divergences[tokens]), _SumOfExponentials(divergences[tokens])
        weights, others = (q, p) if divergence == "forward" else (p, q)
        moment = torch.zeros_like(p.total)  # sum(exp(gap) * (gap - other gap)) of the weights
        for classes in student.classes():
            p.take_(_logits(student, tokens, classes, student.dtype))
            q.take_(_logits(teacher, tokens, classes, student.dtype))
            if divergence != "jsd":
                differences = _differences(weights.gaps, others.gaps)
                # What underflows, here and below, still makes an infinite difference infinite.
                decay = weights.decay.clamp(min=tiny)
                moment.addcmul_(others.rise - weights.rise, weights.total).mul_(decay)
            p.add_exponentials_()
            q.add_exponentials_()
            if divergence != "jsd":
                moment += differences.mul_(weights.gaps.clamp_(min=tiny)).sum(1)

        offset = (p.total / q.total).log()
        mean = moment / weights.total
        correction, teacher_sum = torch.zeros_like(mean), torch.zeros_like(mean)
        for classes in student.classes() if divergence != "forward" else ():
            student_gaps = _logits(student, tokens, classes, student.dtype)
            teacher_gaps = _logits(teacher, tokens, classes, student.dtype)
            student_gaps.sub_(p.shift[:, None])
            teacher_gaps.sub_(q.shift[:, None])
            if divergence == "reverse":
                # A confident student's gradient is the last digits of a difference from the mean.
                differences = _differences(student_gaps, teacher_gaps).sub_(mean[:, None])
                correction += differences.mul_(student_gaps.exp_()).sum(1)
                continue
            ratios = _log_ratios(student_gaps, teacher_gaps, offset[:, None])
            excess = _log_mixture(-ratios, 1 - beta)  # log m - log q
            teacher_sum += excess.mul_(teacher_gaps.exp_()).sum(1)
            excess = _log_mixture(ratios, beta)  # log m - log p
            mean += excess.mul_(student_gaps.exp_()).sum(1)
        if divergence == "forward":
            divergences[tokens] = mean + offset
        elif divergence == "reverse":
            divergences[tokens] = mean - offset
            correction /= p.total
        else:
            mean /= p.total
            divergences[tokens] = (beta - 1) * mean - beta * (teacher_sum / q.total)
        statistics[:, tokens] = torch.stack((p.shift, p.total, q.shift, q.total, mean, correction))
    divergences = spread(divergences, rows, len(counted), dim=0).masked_fill(~counted, 0)
    return divergences, spread(statistics, rows, len(counted), dim=1)


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
    rows, (student_hidden, teacher_hidden) = kept_rows(~counted, student_input, teacher_input)
    student, teacher = _heads(
        (student_hidden, student_weight, student_bias, student_softcap),
        (teacher_hidden, teacher_weight, teacher_bias, teacher_softcap),
        temperature,
    )
    scale = grad_divergence.where(counted, 0) / temperature
    vectors = torch.cat((scale[None], statistics))
    if rows is not None:
        vectors = vectors.index_select(1, rows)

    def gradient(tokens: slice, classes: slice) -> tuple[Tensor, None]:
        scale, student_shift, student_total, teacher_shift, teacher_total, *means = (
            vector[:, None] for vector in vectors[:, tokens]
        )
        mean, correction = means
        student_gaps = student.outputs(tokens, classes)
        slope = student.cap(student_gaps, need_slope=True)
        student_gaps.sub_(student_shift)
        teacher_gaps = _logits(teacher, tokens, classes, student.dtype).sub_(teacher_shift)
        if divergence == "forward":
            p = student_gaps.exp_().mul_(scale / student_total)
            grad = p.sub_(teacher_gaps.exp_().mul_(scale / teacher_total))
        elif divergence == "reverse":
            ratios = _differences(student_gaps, teacher_gaps).sub_(mean).sub_(correction)
            grad = student_gaps.exp_().mul_(scale / student_total).mul_(ratios)
        else:
            offset = (student_total / teacher_total).log()
            excess = _log_mixture(_log_ratios(student_gaps, teacher_gaps, offset), beta)
            share = (beta - 1) * scale / student_total
            grad = student_gaps.exp_().mul_(share).mul_(excess.sub_(mean))
        return grad if slope is None else grad.mul_(slope), None

    grad_hidden, grad_weight, grad_bias = student.gradients(needed, gradient)
    if needed[0]:
        grad_hidden = spread(grad_hidden, rows, len(counted), dim=0)
    return grad_hidden, grad_weight, grad_bias


_HeadTensors = tuple[Tensor, Tensor, Tensor | None, float | None]


def _heads(student: _HeadTensors, teacher: _HeadTensors, temperature: float) -> tuple[Head, Head]:
    """Two heads with the same tiles of classes."""
    width = min(tile_width(len(hidden), weight) for hidden, weight, *_ in (student, teacher))
    return Head(*student, temperature, width), Head(*teacher, temperature, width)


def _logits(head: Head, tokens: slice, classes: slice, dtype: torch.dtype) -> Tensor:
    logits = head.outputs(tokens, classes)
    head.cap(logits)
    return logits.to(dtype)


class _SumOfExponentials:
    """The sum of the exponentials of rows' logits, in units of the exponential of their maximum."""

    def __init__(self, rows: Tensor) -> None:
        self.total, self.shift = torch.zeros_like(rows), torch.zeros_like(rows)
        self._peak = torch.full_like(rows, -torch.inf)

    def take_(self, logits: Tensor) -> None:
        """Make ``gaps`` of a tile, in place: what its logits exceed the maximum by, up to here."""
        old_peak, self._peak = self._peak, torch.maximum(self._peak, logits.amax(1))
        # A row of -inf alone has no finite maximum to subtract.
        old_shift, self.shift = self.shift, self._peak.where(self._peak != -torch.inf, 0)
        self.rise = self.shift - old_shift
        self.decay = (old_peak - self.shift).exp_()
        self.gaps = logits.sub_(self.shift[:, None])

    def add_exponentials_(self) -> None:
        """Replace the gaps by their exponentials and add these."""
        self.total = self.total * self.decay + self.gaps.exp_().sum(1)


def _differences(gaps: Tensor, others: Tensor) -> Tensor:
    """``gaps - others``, and 0 for classes that are impossible under the first."""
    return (gaps - others).masked_fill_(gaps == -torch.inf, 0)


def _log_mixture(gains: Tensor, share: float) -> Tensor:
    """``log(1 + share * (exp(gains) - 1))``, with the gains clamped in place.

    A mixture exceeds one of its two parts by this, when the other part, of this share, exceeds it
    by ``gains``.
    """
    gains.clamp_(max=NEGLIGIBLE_PART)
    near = gains.expm1().mul_(share)
    far = gains.exp_().mul_(share).add_(1 - share)
    # The first is exact around 0, the second where the mixture is far below the part.
    return torch.where(near > -0.5, near.log1p(), far.log_())


def _log_ratios(student_gaps: Tensor, teacher_gaps: Tensor, offset: Tensor) -> Tensor:
    """``log q - log p``, from gaps that are clamped in place.

    Where p or q is 0, it stays 0, and the ratio stays finite.
    """
    ratios = teacher_gaps.clamp_(min=NEGLIGIBLE) - student_gaps.clamp_(min=NEGLIGIBLE)
    return ratios.add_(offset)
