"""Losses."""

from tilework.losses.classification.cross_entropy_with_z_loss import (
    CrossEntropyWithZLoss,
    cross_entropy_with_z_loss,
)
from tilework.losses.classification.squentropy import SquentropyLoss, squentropy
from tilework.losses.classification.z_loss import ZLoss, z_loss
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
    "CrossEntropyWithZLoss",
    "LinearCrossEntropy",
    "LinearCrossEntropyLoss",
    "LinearKLDivLoss",
    "LinearLogProbs",
    "SquentropyLoss",
    "VocabShard",
    "ZLoss",
    "cross_entropy_with_z_loss",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_log_probs",
    "sequence_log_probs",
    "squentropy",
    "z_loss",
]
