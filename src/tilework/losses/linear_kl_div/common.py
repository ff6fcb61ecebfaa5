"""What is made of sums over the classes of two heads, however these were computed.

One pass over the classes gives the first sums; for ``"jsd"`` a second one, which needs them, gives
those under the mixture. Where the classes are in parts, the sums of the parts are merged.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from tilework.losses._classes.linear.common import product_operations
from tilework.losses._classes.tiles import NEGLIGIBLE, merge_exponentials

# A part that the other exceeds by more, in logarithms, vanishes beside it in every dtype.
NEGLIGIBLE_PART = 80.0

# For each row: ``shift = max z`` and ``total = sum(exp(z - shift))`` of the student, the same of
# the teacher, and two numbers about the head that weights the classes, which is the teacher for
# "forward" and else the student: the ``base``, the other head's logit of its likeliest class, and
# ``sum(exp(z - shift) * ((z - other z) - (shift - base)))``, for "jsd" 0. A confident head thus has
# the differences of its other classes from its likeliest one, and not the last digits of a mean.
SUMS = 6


STUDENT = ("student_input", "student_weight", "student_bias")
"""What has gradients."""

HeadTensors = tuple[Tensor, Tensor, Tensor | None, float | None]


class Heads(NamedTuple):
    """Two linear heads, which of their rows are counted, and what is asked of them."""

    student_input: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_input: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    counted: Tensor
    student_softcap: float | None
    teacher_softcap: float | None
    temperature: float
    divergence: str
    beta: float
    implementation: str

    @property
    def student(self) -> HeadTensors:
        """Input, weight, bias and softcap."""
        return self.student_input, self.student_weight, self.student_bias, self.student_softcap

    @property
    def teacher(self) -> HeadTensors:
        """Input, weight, bias and softcap."""
        return self.teacher_input, self.teacher_weight, self.teacher_bias, self.teacher_softcap


def operations(given: Heads) -> int:
    """Those of the logits of both heads."""
    classes = given.student_weight.shape[0]
    student = product_operations(*given.student_input.shape, classes)
    return student + product_operations(*given.teacher_input.shape, classes)


def backward_operations(given: Heads, needed: Collection[str]) -> int:
    """Those of the student's gradients."""
    factors = sum(name in needed for name in STUDENT[:2])
    return factors * product_operations(*given.student_input.shape, given.student_weight.shape[0])


class Divergences(NamedTuple):
    """The divergence of each row, 0 where it is not counted, and what the backward needs.

    ``statistics`` are the first five sums, and the mean under p of what ``log p - log q`` exceeds
    that of the student's likeliest class by (reverse), or of the same for ``log m - log p`` (jsd).
    """

    value: Tensor
    statistics: Tensor


def divergence_and_statistics(
    given: Heads,
    sums_of: Callable[[Heads], Tensor],
    mixture_sums_of: Callable[[Heads, Tensor], Tensor],
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Divergences:
    """Make them of an implementation's sums.

    ``gather`` gives the sums over all parts of the classes, in their order, for those over one.
    """
    counted, divergence, beta = given.counted, given.divergence, given.beta
    sums = sums_of(given)
    if gather is not None:
        sums = merge(gather(sums), divergence)
    # Rows that are not counted have a total of 1 and 0 elsewhere.
    blank = sums.new_zeros(SUMS, 1)
    blank[1:4:2] = 1
    sums = sums.where(counted, blank)
    student_shift, student_total, teacher_shift, teacher_total, base, moment = sums
    if divergence == "forward":
        mean = moment / teacher_total
        result = mean + (student_shift - base) + (student_total / teacher_total).log()
    elif divergence == "reverse":
        mean = moment / student_total
        result = mean + (teacher_shift - base) + (teacher_total / student_total).log()
    else:
        pivot = likeliest_excess(sums, beta)
        more = mixture_sums_of(given, sums)
        if gather is not None:
            more = gather(more).sum(0)
        student_sum, teacher_sum = more
        mean = (student_sum / student_total).where(counted, 0)
        result = (beta - 1) * (pivot + mean) - beta * (teacher_sum / teacher_total)
    return Divergences(result.where(counted, 0), torch.cat((sums[:5], mean[None])))


def merge(parts: Tensor, divergence: str) -> Tensor:
    """The first sums over all classes from those over parts of them, shape (parts, 6, N)."""
    student_shifts, student_totals, teacher_shifts, teacher_totals, bases, moments = parts.unbind(1)
    student = merge_exponentials(student_shifts, student_totals)
    teacher = merge_exponentials(teacher_shifts, teacher_totals)
    shifts, totals, (shift, _, _, decays) = (
        (teacher_shifts, teacher_totals, teacher)
        if divergence == "forward"
        else (student_shifts, student_totals, student)
    )
    likeliest = shifts.where(totals != 0, -torch.inf).max(0).indices
    base = bases.gather(0, likeliest[None])[0]
    moment = torch.zeros_like(base)
    if divergence != "jsd":
        # What underflows still makes an infinite difference infinite.
        decays = decays.clamp(min=torch.finfo(decays.dtype).tiny).where(totals != 0, 0)
        changes = (shifts - bases) - (shift - base)
        moment = (decays * (moments + totals * changes)).sum(0)
    return torch.stack((*student[:2], *teacher[:2], base, moment))


def likeliest_excess(sums: Tensor, beta: float) -> Tensor:
    """``log m - log p`` of the student's likeliest class."""
    _, student_total, teacher_shift, teacher_total, base = sums[:5]
    gaps = (base - teacher_shift).clamp(min=NEGLIGIBLE)
    return log_mixture(gaps + (student_total / teacher_total).log(), beta)


def log_mixture(gains: Tensor, share: float) -> Tensor:
    """``log(1 + share * (exp(gains) - 1))``, with the gains clamped in place.

    A mixture exceeds one of its two parts by this, when the other part, of this share, exceeds it
    by ``gains``.
    """
    gains.clamp_(max=NEGLIGIBLE_PART)
    near = gains.expm1().mul_(share)
    far = gains.exp_().mul_(share).add_(1 - share)
    # The first is exact around 0, the second where the mixture is far below the part.
    return torch.where(near > -0.5, near.log1p(), far.log_())
