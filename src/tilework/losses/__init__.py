"""Losses."""

from tilework.losses.linear_cross_entropy import (
    LinearCrossEntropy,
    LinearCrossEntropyLoss,
    linear_cross_entropy,
)

__all__ = ["LinearCrossEntropy", "LinearCrossEntropyLoss", "linear_cross_entropy"]
