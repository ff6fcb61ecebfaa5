"""Whole models: their layers quantized one after another, and kept in files."""

from tilework.quant.models.configs import (
    AdaDimConfig,
    AWQConfig,
    GPTQConfig,
    LDLQConfig,
    QuIPConfig,
    RTNConfig,
    SpQRConfig,
    VPTQConfig,
)
from tilework.quant.models.export_quantized import export_quantized, import_quantized_
from tilework.quant.models.quantize import quantize_
from tilework.quant.models.report import LayerReport, QuantizationReport
from tilework.quant.models.save_quantized import load_quantized_, save_quantized

__all__ = [
    "AWQConfig",
    "AdaDimConfig",
    "GPTQConfig",
    "LDLQConfig",
    "LayerReport",
    "QuIPConfig",
    "QuantizationReport",
    "RTNConfig",
    "SpQRConfig",
    "VPTQConfig",
    "export_quantized",
    "import_quantized_",
    "load_quantized_",
    "quantize_",
    "save_quantized",
]
