"""Quantized weights in the layouts that models are served in."""

from tilework.quant.layouts.awq_layout import from_awq, to_awq
from tilework.quant.layouts.compressed_tensors_layout import (
    from_compressed_tensors,
    to_compressed_tensors,
)
from tilework.quant.layouts.gptq_layout import from_gptq, to_gptq

__all__ = [
    "from_awq",
    "from_compressed_tensors",
    "from_gptq",
    "to_awq",
    "to_compressed_tensors",
    "to_gptq",
]
