"""Activations as integers, and products of integers."""

from tilework.quant.activations.quantize_activation import quantize_activation
from tilework.quant.activations.w4a8_linear import w4a8_linear

__all__ = ["quantize_activation", "w4a8_linear"]
