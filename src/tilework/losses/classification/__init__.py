"""Losses on the logits of a classification."""

from tilework.losses.classification.categorical_value import categorical_value
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
from tilework.losses.classification.emo_loss import EMOLoss, emo_loss
from tilework.losses.classification.error_norm import (
    ErrorNormTruncationLoss,
    error_norm,
    error_norm_truncation_loss,
    linear_error_norm_truncation_loss,
)
from tilework.losses.classification.hl_gauss_loss import (
    HLGaussLoss,
    hl_gauss_loss,
    hl_gauss_targets,
)
from tilework.losses.classification.ldr_kl_loss import (
    ALDRKLLoss,
    LDRKLLoss,
    aldr_kl_loss,
    ldr_kl_loss,
    linear_ldr_kl_loss,
)
from tilework.losses.classification.number_token_loss import (
    NumberTokenCrossEntropyLoss,
    NumberTokenLoss,
    number_token_cross_entropy,
    number_token_loss,
)
from tilework.losses.classification.soft_symmetric_cross_entropy import (
    SoftSymmetricCrossEntropyLoss,
    soft_symmetric_cross_entropy,
)
from tilework.losses.classification.squentropy import SquentropyLoss, linear_squentropy, squentropy
from tilework.losses.classification.two_hot_targets import c51_targets, two_hot_targets
from tilework.losses.classification.z_loss import ZLoss, linear_z_loss, z_loss

__all__ = [
    "ALDRKLLoss",
    "CompSumLoss",
    "CrossEntropyWithZLoss",
    "EMOLoss",
    "ErrorNormTruncationLoss",
    "HLGaussLoss",
    "LDRKLLoss",
    "NumberTokenCrossEntropyLoss",
    "NumberTokenLoss",
    "SoftSymmetricCrossEntropyLoss",
    "SquentropyLoss",
    "ZLoss",
    "aldr_kl_loss",
    "c51_targets",
    "categorical_value",
    "comp_sum_loss",
    "cross_entropy_with_z_loss",
    "emo_loss",
    "error_norm",
    "error_norm_truncation_loss",
    "hl_gauss_loss",
    "hl_gauss_targets",
    "ldr_kl_loss",
    "linear_comp_sum_loss",
    "linear_error_norm_truncation_loss",
    "linear_ldr_kl_loss",
    "linear_squentropy",
    "linear_z_loss",
    "number_token_cross_entropy",
    "number_token_loss",
    "smooth_adversarial_comp_sum_loss",
    "soft_symmetric_cross_entropy",
    "squentropy",
    "two_hot_targets",
    "z_loss",
]
