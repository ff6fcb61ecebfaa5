"""Losses."""

from tilework.losses.calibration.calibeating import Calibeating
from tilework.losses.calibration.expected_calibration_error import (
    ReliabilityDiagram,
    expected_calibration_error,
)
from tilework.losses.calibration.mixup import MixupBatch, mixup_batch, mixup_cross_entropy
from tilework.losses.calibration.online_platt_scaling import OnlinePlattScaling
from tilework.losses.calibration.temperature_scaling import TemperatureScaling
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
from tilework.losses.regression.aggregate_quantiles import QuantileAggregator, aggregate_quantiles
from tilework.losses.regression.conformal_offset import conformal_offset
from tilework.losses.regression.monotone_quantiles import monotone_quantiles
from tilework.losses.regression.pinball_loss import pinball_loss
from tilework.losses.regression.quantile_crossing_penalty import quantile_crossing_penalty
from tilework.losses.regression.weighted_interval_score import weighted_interval_score
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
    "Calibeating",
    "CrossEntropyWithZLoss",
    "DynamicLossSizeWeighting",
    "F1Thresholds",
    "GradNorm",
    "LinearCrossEntropy",
    "LinearCrossEntropyLoss",
    "LinearKLDivLoss",
    "LinearLogProbs",
    "LossBasedReweighting",
    "MixupBatch",
    "MultilabelFocalLoss",
    "NormLoss",
    "OnlinePlattScaling",
    "QuantileAggregator",
    "ReliabilityDiagram",
    "SquentropyLoss",
    "TemperatureScaling",
    "VocabShard",
    "ZLoss",
    "aggregate_quantiles",
    "best_f1_thresholds",
    "conformal_offset",
    "cross_entropy_with_z_loss",
    "expected_calibration_error",
    "grad_norm_loss",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_log_probs",
    "loss_based_reweighting",
    "loss_based_weights",
    "mixup_batch",
    "mixup_cross_entropy",
    "monotone_quantiles",
    "multilabel_focal_loss",
    "norm_loss",
    "pinball_loss",
    "quantile_crossing_penalty",
    "sequence_log_probs",
    "squentropy",
    "weighted_interval_score",
    "z_loss",
]
