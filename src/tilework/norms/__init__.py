"""Normalization layers and their functions."""

from tilework.norms.layer_norm import LayerNorm, layer_norm
from tilework.norms.partial_rms_norm import PartialRMSNorm, partial_rms_norm
from tilework.norms.rms_norm import RMSNorm, rms_norm
from tilework.norms.scaled_std_conv2d import ScaledStdConv2d

__all__ = [
    "LayerNorm",
    "layer_norm",
    "PartialRMSNorm",
    "partial_rms_norm",
    "RMSNorm",
    "rms_norm",
    "ScaledStdConv2d",
]
