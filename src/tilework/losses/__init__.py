"""Losses."""

from tilework.losses.linear_cross_entropy import (
    LinearCrossEntropy,
    LinearCrossEntropyLoss,
    VocabShard,
    linear_cross_entropy,
)
from tilework.losses.linear_kl_div import LinearKLDivLoss, linear_kl_div
from tilework.losses.linear_log_probs import LinearLogProbs, linear_log_probs
from tilework.losses.sequence_log_probs import sequence_log_probs

__all__ = [
    "LinearCrossEntropy",
    "LinearCrossEntropyLoss",
    "LinearKLDivLoss",
    "LinearLogProbs",
    "VocabShard",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_log_probs",
    "sequence_log_probs",
]
