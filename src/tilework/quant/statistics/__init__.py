"""What a layer's inputs say about its weights."""

from tilework.quant.statistics.hessian_accumulator import HessianAccumulator, hessian_loss

__all__ = [
    "HessianAccumulator",
    "hessian_loss",
]
