"""Quantization in training: values of grids, with gradients."""

from tilework.quant.training.balanced_quantize import balanced_quantize, balanced_scale_init
from tilework.quant.training.lsq_quantize import lsq_quantize
from tilework.quant.training.oscillation_tracker import OscillationTracker
from tilework.quant.training.qk_reparam_scores import qk_reparam_scores
from tilework.quant.training.quest_quantize import QuestLinear, QuestQuantizer, quest_quantize
from tilework.quant.training.reste_sign import (
    ReSTEConv2d,
    ReSTELinear,
    reste_exponent,
    reste_sign,
)
from tilework.quant.training.statsq_quantize import StatsQuantizer, statsq_quantize
from tilework.quant.training.straight_through import fake_quantize, straight_through
from tilework.quant.training.svid_decompose import OneBitLinear, sign_ste, svid_decompose

__all__ = [
    "fake_quantize",
    "straight_through",
    "quest_quantize",
    "QuestQuantizer",
    "QuestLinear",
    "statsq_quantize",
    "StatsQuantizer",
    "OscillationTracker",
    "qk_reparam_scores",
    "lsq_quantize",
    "balanced_quantize",
    "balanced_scale_init",
    "sign_ste",
    "svid_decompose",
    "OneBitLinear",
    "reste_sign",
    "reste_exponent",
    "ReSTELinear",
    "ReSTEConv2d",
]
