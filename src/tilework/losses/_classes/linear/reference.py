"""The statistics of a linear head's logits, by their definition. The logits are stored."""

import torch.nn.functional as F

from tilework._operators import computation_dtype
from tilework.losses._classes.linear.common import LinearStats
from tilework.losses._classes.logits import reference
from tilework.losses._classes.logits.common import LogitStats
from tilework.losses._classes.statistics import Statistics


def forward(given: LinearStats) -> Statistics:
    """See :class:`Statistics`; ``gradient_filter`` leaves out nothing here."""
    dtype = computation_dtype(given.input.dtype)
    kept = given.target != given.ignore_index
    hidden = given.input.to(dtype).where(kept[:, None], 0)
    bias = None if given.linear_bias is None else given.linear_bias.to(dtype)
    output = F.linear(hidden, given.linear_weight.to(dtype), bias)
    logits = output
    if given.softcap is not None:
        logits = given.softcap * (logits / given.softcap).tanh()
    statistics = reference.forward(
        LogitStats(
            logits / given.temperature,
            given.target,
            given.class_weight,
            given.ignore_index,
            given.squares,
            given.moments,
            "reference",
        )
    )
    if not given.moments:
        return statistics
    top, argmax = (values.where(kept, 0) for values in output.detach().max(1))
    return statistics._replace(top=top, argmax=argmax)
