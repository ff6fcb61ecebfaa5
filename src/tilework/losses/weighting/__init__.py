"""Weights of samples, labels, rows and tasks."""

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
    "DynamicLossSizeWeighting",
    "F1Thresholds",
    "GradNorm",
    "LossBasedReweighting",
    "MultilabelFocalLoss",
    "NormLoss",
    "best_f1_thresholds",
    "grad_norm_loss",
    "loss_based_reweighting",
    "loss_based_weights",
    "multilabel_focal_loss",
    "norm_loss",
]
