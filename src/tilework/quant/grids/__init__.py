"""Grids of levels, and rounding to the nearest."""

from tilework.quant.grids.allocate_bits import allocate_bits, size_aware_score
from tilework.quant.grids.fit_grid import dequantize_affine, fit_grid, quantize_affine
from tilework.quant.grids.minifloat_quantize import (
    E2M1,
    E2M3,
    E3M2,
    E3M4_IEEE,
    E4M3_FN,
    E4M3_IEEE,
    E5M2_IEEE,
    MinifloatFormat,
    minifloat_decode,
    minifloat_encode,
    minifloat_quantize,
    minifloat_scale,
)
from tilework.quant.grids.rtn_quantize import rtn_quantize
from tilework.quant.grids.weighted_kmeans import weighted_kmeans

__all__ = [
    "dequantize_affine",
    "fit_grid",
    "quantize_affine",
    "rtn_quantize",
    "E2M1",
    "E2M3",
    "E3M2",
    "E3M4_IEEE",
    "E4M3_FN",
    "E4M3_IEEE",
    "E5M2_IEEE",
    "MinifloatFormat",
    "minifloat_quantize",
    "minifloat_scale",
    "minifloat_encode",
    "minifloat_decode",
    "weighted_kmeans",
    "size_aware_score",
    "allocate_bits",
]
