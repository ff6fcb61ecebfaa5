"""Losses."""

from tilework.losses import calibration, classification, regression, routing, weighting
from tilework.losses.calibration import *
from tilework.losses.classification import *
from tilework.losses.linear_cross_entropy import (
    LinearCrossEntropy,
    LinearCrossEntropyLoss,
    VocabShard,
    linear_cross_entropy,
)
from tilework.losses.linear_kl_div import LinearKLDivLoss, linear_kl_div
from tilework.losses.linear_log_probs import LinearLogProbs, linear_log_probs
from tilework.losses.regression import *
from tilework.losses.routing import *
from tilework.losses.sequence_log_probs import sequence_log_probs
from tilework.losses.weighting import *

__all__ = [
    "LinearCrossEntropy",
    "LinearCrossEntropyLoss",
    "VocabShard",
    "linear_cross_entropy",
    "LinearKLDivLoss",
    "linear_kl_div",
    "LinearLogProbs",
    "linear_log_probs",
    "sequence_log_probs",
    *calibration.__all__,
    *classification.__all__,
    *regression.__all__,
    *routing.__all__,
    *weighting.__all__,
]
