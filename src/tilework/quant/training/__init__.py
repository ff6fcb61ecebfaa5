"""Quantization in training: values of grids, with gradients."""

from tilework.quant.training.straight_through import fake_quantize, straight_through

__all__ = [
    "fake_quantize",
    "straight_through",
]
