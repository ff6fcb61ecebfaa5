"""Rounding that knows the inputs of the layer."""

from tilework.quant.rounding.gptq_quantize import gptq_quantize
from tilework.quant.rounding.ldlq_quantize import ldlq_quantize

__all__ = [
    "gptq_quantize",
    "ldlq_quantize",
]
