"""Losses."""

from tilework.losses.classification.comp_sum_loss import (
    CompSumLoss,
    comp_sum_loss,
    linear_comp_sum_loss,
    smooth_adversarial_comp_sum_loss,
)
from tilework.losses.classification.cross_entropy_with_z_loss import (
    CrossEntropyWithZLoss,
    cross_entropy_with_z_loss,
)
from tilework.losses.classification.error_norm import (
    ErrorNormTruncationLoss,
    error_norm,
    error_norm_truncation_loss,
    linear_error_norm_truncation_loss,
)
from tilework.losses.classification.ldr_kl_loss import (
    ALDRKLLoss,
    LDRKLLoss,
    aldr_kl_loss,
    ldr_kl_loss,
    linear_ldr_kl_loss,
)
from tilework.losses.classification.squentropy import (
    SquentropyLoss,
    linear_squentropy,
    squentropy,
)
from tilework.losses.classification.z_loss import ZLoss, linear_z_loss, z_loss
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
    "ALDRKLLoss",
    "CompSumLoss",
    "CrossEntropyWithZLoss",
    "ErrorNormTruncationLoss",
    "LDRKLLoss",
    "LinearCrossEntropy",
    "LinearCrossEntropyLoss",
    "LinearKLDivLoss",
    "LinearLogProbs",
    "SquentropyLoss",
    "VocabShard",
    "ZLoss",
    "aldr_kl_loss",
    "comp_sum_loss",
    "cross_entropy_with_z_loss",
    "error_norm",
    "error_norm_truncation_loss",
    "ldr_kl_loss",
    "linear_comp_sum_loss",
    "linear_cross_entropy",
    "linear_error_norm_truncation_loss",
    "linear_kl_div",
    "linear_ldr_kl_loss",
    "linear_log_probs",
    "linear_squentropy",
    "linear_z_loss",
    "sequence_log_probs",
    "smooth_adversarial_comp_sum_loss",
    "squentropy",
    "z_loss",
]
