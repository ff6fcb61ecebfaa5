"""Codes and what they stand for."""

from tilework.quant.storage.pack_codes import pack_codes, unpack_codes
from tilework.quant.storage.quantized_tensor import QuantizedTensor
from tilework.quant.storage.vector_quantized_tensor import VectorQuantizedTensor

__all__ = [
    "QuantizedTensor",
    "pack_codes",
    "unpack_codes",
    "VectorQuantizedTensor",
]
