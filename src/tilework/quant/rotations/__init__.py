"""Rotations and scales of weights and activations, after which these are easier to quantize."""

from tilework.quant.rotations.hadamard import (
    hadamard_matrix,
    hadamard_transform,
    random_hadamard_matrix,
    random_orthogonal_matrix,
)

__all__ = [
    "hadamard_matrix",
    "hadamard_transform",
    "random_hadamard_matrix",
    "random_orthogonal_matrix",
]
