"""The formula of cross-entropy, which several losses are or have a part of."""

from torch import Tensor

from tilework.losses._classes.positions import Positions
from tilework.losses._classes.statistics import Rows, Statistics, formula

_NAME = "cross_entropy"


def cross_entropy(
    positions: Positions,
    reduction: str,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    *,
    statistics: Statistics | None = None,
) -> Tensor:
    """The smoothed and weighted cross-entropy as torch defines it, and the penalty beside it."""
    spreads = label_smoothing != 0
    numbers = label_smoothing, z_loss
    return positions.loss(_NAME, numbers, reduction, spreads=spreads, statistics=statistics)


@formula(_NAME)
def _cross_entropy(
    statistics: Statistics, rows: Rows, label_smoothing: float, z_loss: float
) -> Tensor:
    log_sum = statistics.total.log()
    losses = rows.target_weight * (statistics.target_gap + log_sum)
    if rows.spread is not None:
        spread = rows.weight / rows.classes * (statistics.class_gap + rows.spread * log_sum)
        losses = (1 - label_smoothing) * losses + label_smoothing * spread
    if z_loss:
        losses = losses + z_loss * rows.weight * (statistics.shift + log_sum).square()
    return losses
