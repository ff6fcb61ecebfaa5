"""Attention."""

from tilework.attention.qk_norm_attention import QKNormAttention, qk_norm_attention

__all__ = ["QKNormAttention", "qk_norm_attention"]
