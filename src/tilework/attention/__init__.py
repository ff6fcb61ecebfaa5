"""Attention."""

from tilework.attention.block_layout import BlockLayout, causal_topk
from tilework.attention.qk_norm_attention import QKNormAttention, qk_norm_attention

__all__ = ["BlockLayout", "QKNormAttention", "causal_topk", "qk_norm_attention"]
