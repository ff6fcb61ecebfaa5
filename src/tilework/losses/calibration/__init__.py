"""Calibrated probabilities: how to get them and how to measure them."""

from tilework.losses.calibration.calibeating import Calibeating
from tilework.losses.calibration.expected_calibration_error import (
    ReliabilityDiagram,
    expected_calibration_error,
)
from tilework.losses.calibration.mixup import MixupBatch, mixup_batch, mixup_cross_entropy
from tilework.losses.calibration.online_platt_scaling import OnlinePlattScaling
from tilework.losses.calibration.temperature_scaling import TemperatureScaling

__all__ = [
    "Calibeating",
    "MixupBatch",
    "OnlinePlattScaling",
    "ReliabilityDiagram",
    "TemperatureScaling",
    "expected_calibration_error",
    "mixup_batch",
    "mixup_cross_entropy",
]
