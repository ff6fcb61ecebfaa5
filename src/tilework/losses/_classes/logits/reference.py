"""The statistics of logits by their definition."""

import torch

from tilework._operators import computation_dtype
from tilework.losses._classes.logits.common import LogitStats
from tilework.losses._classes.statistics import Statistics


def forward(given: LogitStats) -> Statistics:
    """See :class:`Statistics`. The class weights are those of ``class_gap``."""
    kept = given.target != given.ignore_index
    logits = given.input.to(computation_dtype(given.input.dtype)).where(kept.unsqueeze(1), 0)
    classes = logits.shape[1]
    shift = logits.detach().amax(1)
    gap = shift.unsqueeze(1) - logits
    exponentials = gap.neg().exp()
    total = exponentials.sum(1)
    inside = (given.target >= 0) & (given.target < classes)
    column = given.target.where(inside, 0).unsqueeze(1)
    target_gap = (shift - logits.gather(1, column).squeeze(1)).where(inside, torch.nan)
    none = shift.new_empty(0)
    class_gap = torch.zeros_like(shift)
    if given.class_weight is not None:
        weights = given.class_weight.reshape(-1, *[1] * (logits.dim() - 2))
        class_gap = (gap * weights).sum(1)
    squares = none
    if given.squares:
        order = torch.arange(classes, device=logits.device).reshape(-1, *[1] * (logits.dim() - 2))
        others = order != given.target.unsqueeze(1)
        squares = logits.where(others, 0).square().sum(1).where(kept, 0)
    moment, top, argmax = none, none, given.target[:0].flatten()
    if given.moments:
        # Classes of a logit of -inf have no part in it.
        finite = gap.where(gap != torch.inf, 0)
        moment = (exponentials * finite).sum(1).where(kept, 0)
        top, argmax = (values.where(kept, 0) for values in logits.detach().max(1))
    return Statistics(
        shift.where(kept, 0),
        total.where(kept, 1),
        target_gap.where(kept, 0),
        class_gap.where(kept, 0),
        squares,
        moment,
        top,
        argmax,
    )
