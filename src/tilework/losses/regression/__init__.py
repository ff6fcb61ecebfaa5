"""Losses of real-valued targets."""

from tilework.losses.regression.aggregate_quantiles import QuantileAggregator, aggregate_quantiles
from tilework.losses.regression.conformal_offset import conformal_offset
from tilework.losses.regression.monotone_quantiles import monotone_quantiles
from tilework.losses.regression.pinball_loss import pinball_loss
from tilework.losses.regression.quantile_crossing_penalty import quantile_crossing_penalty
from tilework.losses.regression.weighted_interval_score import weighted_interval_score

__all__ = [
    "QuantileAggregator",
    "aggregate_quantiles",
    "conformal_offset",
    "monotone_quantiles",
    "pinball_loss",
    "quantile_crossing_penalty",
    "weighted_interval_score",
]
