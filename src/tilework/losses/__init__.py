"""Losses."""

from tilework.losses.linear_cross_entropy import (
    LinearCrossEntropy,
    LinearCrossEntropyLoss,
    VocabShard,
    linear_cross_entropy,
)
from tilework.losses.linear_log_probs import LinearLogProbs, linear_log_probs
from tilework.losses.sequence_log_probs import sequence_log_probs

__all__ = [
    "LinearCrossEntropy",
    "LinearCrossEntropyLoss",
    "LinearLogProbs",
    "VocabShard",
    "linear_cross_entropy",
    "linear_log_probs",
    "sequence_log_probs",
]
