"""Normalization layers and their functions."""

from tilework.norms.rms_norm import RMSNorm, rms_norm

__all__ = ["RMSNorm", "rms_norm"]
