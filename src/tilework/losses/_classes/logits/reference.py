"""The statistics of logits by their definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework._operators import computation_dtype
from tilework.losses._classes import class_index
from tilework.losses._classes.logits.common import LogitStats
from tilework.losses._classes.statistics import Statistics, empty, masked


def forward(given: LogitStats) -> Statistics:
    """See :class:`Statistics`. The class weights are those of ``class_gap``."""
    kept = class_index.is_kept(given.target, given.ignore_index)
    values = given.input.to(computation_dtype(given.input.dtype))
    logits = values.where(kept.unsqueeze(1), 0)
    classes = logits.shape[1]
    shift = values.detach().amax(1)  # masked at the end, as a mask between loops splits these
    # A row of -inf alone, as a part of the classes may be, has no finite peak to subtract.
    shift = shift.where(shift != -torch.inf, 0)
    gap = shift.unsqueeze(1) - logits
    exponentials = gap.neg().exp()
    total = exponentials.sum(1)
    inside = class_index.is_class(given.target, classes)
    # Not a gather, whose gradient is a scatter that compilers do not fuse.
    missed = F.nll_loss(logits, given.target.where(inside, 0), reduction="none")
    target_gap = (shift + missed).where(inside, torch.nan)
    statistics = empty(given.input, given.target, given.squares, given.moments)
    class_gap = torch.zeros_like(shift)
    if given.class_weight is not None:
        class_gap = (gap * _of_classes(given.class_weight, logits)).sum(1)
    statistics = statistics._replace(
        shift=shift, total=total, target_gap=target_gap, class_gap=class_gap
    )
    if given.squares:
        order = _of_classes(torch.arange(classes, device=logits.device), logits)
        others = logits.where(order != given.target.unsqueeze(1), 0)
        statistics = statistics._replace(squares=others.square().sum(1))
    if given.moments:
        # Classes of a logit of -inf have no part in it.
        moment = (exponentials * gap.where(gap != torch.inf, 0)).sum(1)
        top, argmax = logits.detach().max(1)
        statistics = statistics._replace(moment=moment, top=top, argmax=argmax)
    return masked(statistics, kept)


def _of_classes(values: Tensor, logits: Tensor) -> Tensor:
    """A vector over classes in the dimension of the classes."""
    return values.reshape(-1, *[1] * (logits.dim() - 2))
