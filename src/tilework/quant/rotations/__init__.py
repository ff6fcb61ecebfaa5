"""Rotations and scales that make tensors easier to quantize."""

from tilework.quant.rotations.cayley_adam import CayleyAdam
from tilework.quant.rotations.hadamard import (
    hadamard_matrix,
    hadamard_transform,
    random_hadamard_matrix,
    random_orthogonal_matrix,
)
from tilework.quant.rotations.klt_rotation import klt_rotation, smooth_factors
from tilework.quant.rotations.kurtail_rotation import RotationResult, kurtail_rotation
from tilework.quant.rotations.kurtosis_loss import kurtosis, kurtosis_loss
from tilework.quant.rotations.ortho_scale_transform import OrthoScaleTransform
from tilework.quant.rotations.qsur import qsur
from tilework.quant.rotations.rotate_linear import fold_norm_, rotate_linear_
from tilework.quant.rotations.smooth_silu import SmoothSiLU, smooth_silu

__all__ = [
    "hadamard_matrix",
    "hadamard_transform",
    "random_hadamard_matrix",
    "random_orthogonal_matrix",
    "kurtosis",
    "kurtosis_loss",
    "CayleyAdam",
    "RotationResult",
    "kurtail_rotation",
    "rotate_linear_",
    "fold_norm_",
    "klt_rotation",
    "smooth_factors",
    "smooth_silu",
    "SmoothSiLU",
    "OrthoScaleTransform",
    "qsur",
]
