"""Quantization: grids, rounding algorithms, layers, calibration."""

from tilework.quant import (
    activations,
    grids,
    layers,
    layouts,
    matching,
    models,
    products,
    rotations,
    rounding,
    smoothing,
    statistics,
    storage,
    training,
)
from tilework.quant.activations import *
from tilework.quant.grids import *
from tilework.quant.layers import *
from tilework.quant.layouts import *
from tilework.quant.matching import *
from tilework.quant.models import *
from tilework.quant.products import *
from tilework.quant.rotations import *
from tilework.quant.rounding import *
from tilework.quant.smoothing import *
from tilework.quant.statistics import *
from tilework.quant.storage import *
from tilework.quant.training import *

__all__ = [
    *grids.__all__,
    *storage.__all__,
    *products.__all__,
    *statistics.__all__,
    *rounding.__all__,
    *smoothing.__all__,
    *activations.__all__,
    *layers.__all__,
    *models.__all__,
    *layouts.__all__,
    *training.__all__,
    *rotations.__all__,
    *matching.__all__,
]
