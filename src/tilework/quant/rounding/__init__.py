"""Rounding that knows the inputs of the layer."""

from tilework.quant.rounding.gptq_quantize import gptq_quantize
from tilework.quant.rounding.ldlq_quantize import ldlq_quantize
from tilework.quant.rounding.quip_quantize import (
    IncoherenceTransform,
    incoherence_preprocess,
    quip_quantize,
)
from tilework.quant.rounding.spqr_quantize import SpQRTensor, spqr_quantize
from tilework.quant.rounding.vptq_quantize import vptq_quantize
from tilework.quant.rounding.w4a8_quantize import W4A8Tensor, w4a8_quantize

__all__ = [
    "IncoherenceTransform",
    "SpQRTensor",
    "W4A8Tensor",
    "gptq_quantize",
    "incoherence_preprocess",
    "ldlq_quantize",
    "quip_quantize",
    "spqr_quantize",
    "vptq_quantize",
    "w4a8_quantize",
]
