"""Layers whose weights are codes."""

from tilework.quant.layers.low_rank_linear import LowRankLinear, low_rank_compensation
from tilework.quant.layers.quant_linear import QuantLinear

__all__ = ["LowRankLinear", "QuantLinear", "low_rank_compensation"]
