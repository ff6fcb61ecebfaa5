"""Layers whose weights are codes."""

from tilework.quant.layers.quant_linear import QuantLinear

__all__ = ["QuantLinear"]
