"""Losses."""

from tilework.losses.calibration.calibeating import Calibeating
from tilework.losses.calibration.expected_calibration_error import (
    ReliabilityDiagram,
    expected_calibration_error,
)
from tilework.losses.calibration.mixup import MixupBatch, mixup_batch, mixup_cross_entropy
from tilework.losses.calibration.online_platt_scaling import OnlinePlattScaling
from tilework.losses.calibration.temperature_scaling import TemperatureScaling
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
from tilework.losses.linear_cross_entropy import (
    LinearCrossEntropy,
    LinearCrossEntropyLoss,
    VocabShard,
    linear_cross_entropy,
)
from tilework.losses.linear_kl_div import LinearKLDivLoss, linear_kl_div
from tilework.losses.linear_log_probs import LinearLogProbs, linear_log_probs
from tilework.losses.regression.aggregate_quantiles import QuantileAggregator, aggregate_quantiles
from tilework.losses.regression.conformal_offset import conformal_offset
from tilework.losses.regression.monotone_quantiles import monotone_quantiles
from tilework.losses.regression.pinball_loss import pinball_loss
from tilework.losses.regression.quantile_crossing_penalty import quantile_crossing_penalty
from tilework.losses.regression.weighted_interval_score import weighted_interval_score
from tilework.losses.routing.load_balancing_loss import (
    GlobalLoadBalancer,
    expert_counts,
    load_balancing_loss,
)
from tilework.losses.routing.topk_softmax_gate import TopKGate, topk_softmax_gate
from tilework.losses.sequence_log_probs import sequence_log_probs
from tilework.losses.weighting.best_f1_thresholds import F1Thresholds, best_f1_thresholds
from tilework.losses.weighting.dynamic_loss_size_weighting import DynamicLossSizeWeighting
from tilework.losses.weighting.grad_norm import GradNorm, grad_norm_loss
from tilework.losses.weighting.loss_based_reweighting import (
    LossBasedReweighting,
    loss_based_reweighting,
    loss_based_weights,
)
from tilework.losses.weighting.multilabel_focal_loss import (
    MultilabelFocalLoss,
    multilabel_focal_loss,
)
from tilework.losses.weighting.norm_loss import NormLoss, norm_loss

__all__ = [
    "ALDRKLLoss",
    "Calibeating",
    "CompSumLoss",
    "CrossEntropyWithZLoss",
    "DynamicLossSizeWeighting",
    "EMOLoss",
    "ErrorNormTruncationLoss",
    "F1Thresholds",
    "GlobalLoadBalancer",
    "GradNorm",
    "HLGaussLoss",
    "LDRKLLoss",
    "LinearCrossEntropy",
    "LinearCrossEntropyLoss",
    "LinearKLDivLoss",
    "LinearLogProbs",
    "LossBasedReweighting",
    "MixupBatch",
    "MultilabelFocalLoss",
    "NormLoss",
    "NumberTokenCrossEntropyLoss",
    "NumberTokenLoss",
    "OnlinePlattScaling",
    "QuantileAggregator",
    "ReliabilityDiagram",
    "SoftSymmetricCrossEntropyLoss",
    "SquentropyLoss",
    "TemperatureScaling",
    "TopKGate",
    "VocabShard",
    "ZLoss",
    "aggregate_quantiles",
    "aldr_kl_loss",
    "best_f1_thresholds",
    "c51_targets",
    "categorical_value",
    "comp_sum_loss",
    "conformal_offset",
    "cross_entropy_with_z_loss",
    "emo_loss",
    "error_norm",
    "error_norm_truncation_loss",
    "expected_calibration_error",
    "expert_counts",
    "grad_norm_loss",
    "hl_gauss_loss",
    "hl_gauss_targets",
    "ldr_kl_loss",
    "linear_comp_sum_loss",
    "linear_cross_entropy",
    "linear_error_norm_truncation_loss",
    "linear_kl_div",
    "linear_ldr_kl_loss",
    "linear_log_probs",
    "linear_squentropy",
    "linear_z_loss",
    "load_balancing_loss",
    "loss_based_reweighting",
    "loss_based_weights",
    "mixup_batch",
    "mixup_cross_entropy",
    "monotone_quantiles",
    "multilabel_focal_loss",
    "norm_loss",
    "number_token_cross_entropy",
    "number_token_loss",
    "pinball_loss",
    "quantile_crossing_penalty",
    "sequence_log_probs",
    "smooth_adversarial_comp_sum_loss",
    "soft_symmetric_cross_entropy",
    "squentropy",
    "topk_softmax_gate",
    "two_hot_targets",
    "weighted_interval_score",
    "z_loss",
]
