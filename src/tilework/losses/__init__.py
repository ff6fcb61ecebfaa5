"""Losses."""

from tilework.losses.classification.categorical_value import categorical_value
from tilework.losses.classification.cross_entropy_with_z_loss import (
    CrossEntropyWithZLoss,
    cross_entropy_with_z_loss,
)
from tilework.losses.classification.emo_loss import EMOLoss, emo_loss
from tilework.losses.classification.hl_gauss_loss import (
    HLGaussLoss,
    hl_gauss_loss,
    hl_gauss_targets,
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
from tilework.losses.classification.squentropy import SquentropyLoss, squentropy
from tilework.losses.classification.two_hot_targets import c51_targets, two_hot_targets
from tilework.losses.classification.z_loss import ZLoss, z_loss
from tilework.losses.linear_cross_entropy import (
    LinearCrossEntropy,
    LinearCrossEntropyLoss,
    VocabShard,
    linear_cross_entropy,
)
from tilework.losses.linear_kl_div import LinearKLDivLoss, linear_kl_div
from tilework.losses.linear_log_probs import LinearLogProbs, linear_log_probs
from tilework.losses.routing.load_balancing_loss import (
    GlobalLoadBalancer,
    expert_counts,
    load_balancing_loss,
)
from tilework.losses.routing.topk_softmax_gate import TopKGate, topk_softmax_gate
from tilework.losses.sequence_log_probs import sequence_log_probs

__all__ = [
    "CrossEntropyWithZLoss",
    "EMOLoss",
    "GlobalLoadBalancer",
    "HLGaussLoss",
    "LinearCrossEntropy",
    "LinearCrossEntropyLoss",
    "LinearKLDivLoss",
    "LinearLogProbs",
    "NumberTokenCrossEntropyLoss",
    "NumberTokenLoss",
    "SoftSymmetricCrossEntropyLoss",
    "SquentropyLoss",
    "TopKGate",
    "VocabShard",
    "ZLoss",
    "c51_targets",
    "categorical_value",
    "cross_entropy_with_z_loss",
    "emo_loss",
    "expert_counts",
    "hl_gauss_loss",
    "hl_gauss_targets",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_log_probs",
    "load_balancing_loss",
    "number_token_cross_entropy",
    "number_token_loss",
    "sequence_log_probs",
    "soft_symmetric_cross_entropy",
    "squentropy",
    "topk_softmax_gate",
    "two_hot_targets",
    "z_loss",
]
