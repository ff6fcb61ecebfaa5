"""Grids of levels, and rounding to the nearest."""

from tilework.quant.grids.fit_grid import dequantize_affine, fit_grid, quantize_affine
from tilework.quant.grids.minifloat_quantize import (
    MinifloatFormat,
    minifloat_decode,
    minifloat_encode,
    minifloat_quantize,
    minifloat_scale,
)
from tilework.quant.grids.rtn_quantize import rtn_quantize

__all__ = [
    "dequantize_affine",
    "fit_grid",
    "quantize_affine",
    "rtn_quantize",
    "MinifloatFormat",
    "minifloat_quantize",
    "minifloat_scale",
    "minifloat_encode",
    "minifloat_decode",
]
