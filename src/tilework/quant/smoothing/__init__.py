"""Weights that are scaled, clipped or grouped by what their inputs are."""

from tilework.quant.smoothing.adadim_quantize import adadim_quantize
from tilework.quant.smoothing.adaptive_smooth_search import SmoothResult, adaptive_smooth_search
from tilework.quant.smoothing.apply_scale import apply_scale_
from tilework.quant.smoothing.awq_quantize import (
    AWQScale,
    awq_quantize,
    awq_search_clip,
    awq_search_scale,
)

__all__ = [
    "AWQScale",
    "SmoothResult",
    "adadim_quantize",
    "adaptive_smooth_search",
    "apply_scale_",
    "awq_quantize",
    "awq_search_clip",
    "awq_search_scale",
]
