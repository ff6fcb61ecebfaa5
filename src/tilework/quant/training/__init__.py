"""Quantization in training: values of grids, with gradients."""

from tilework.quant.training.quest_quantize import QuestLinear, QuestQuantizer, quest_quantize
from tilework.quant.training.reste_sign import (
    ReSTEConv2d,
    ReSTELinear,
    reste_exponent,
    reste_sign,
)
from tilework.quant.training.straight_through import fake_quantize, straight_through
from tilework.quant.training.svid_decompose import OneBitLinear, sign_ste, svid_decompose

__all__ = [
    "fake_quantize",
    "straight_through",
    "quest_quantize",
    "QuestQuantizer",
    "QuestLinear",
    "sign_ste",
    "svid_decompose",
    "OneBitLinear",
    "reste_sign",
    "reste_exponent",
    "ReSTELinear",
    "ReSTEConv2d",
]
