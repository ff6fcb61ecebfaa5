"""Grids of levels, and rounding to the nearest."""

from tilework.quant.grids.fit_grid import dequantize_affine, fit_grid, quantize_affine
from tilework.quant.grids.rtn_quantize import rtn_quantize

__all__ = [
    "dequantize_affine",
    "fit_grid",
    "quantize_affine",
    "rtn_quantize",
]
