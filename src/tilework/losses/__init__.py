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
from tilework.losses.routing.load_balancing_loss import (
    GlobalLoadBalancer,
    expert_counts,
    load_balancing_loss,
)
from tilework.losses.routing.topk_softmax_gate import TopKGate, topk_softmax_gate
from tilework.losses.sequence_log_probs import sequence_log_probs

__all__ = [
    "CrossEntropyWithZLoss",
    "GlobalLoadBalancer",
    "LinearCrossEntropy",
    "LinearCrossEntropyLoss",
    "LinearKLDivLoss",
    "LinearLogProbs",
    "SquentropyLoss",
    "TopKGate",
    "VocabShard",
    "ZLoss",
    "cross_entropy_with_z_loss",
    "expert_counts",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_log_probs",
    "load_balancing_loss",
    "sequence_log_probs",
    "squentropy",
    "topk_softmax_gate",
    "z_loss",
]
