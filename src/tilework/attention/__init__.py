"""Attention."""

from tilework.attention.block_layout import BlockLayout, causal_topk
from tilework.attention.block_sparse import block_sparse_attention
from tilework.attention.qk_norm_attention import QKNormAttention, qk_norm_attention

__all__ = [
    "BlockLayout",
    "QKNormAttention",
    "block_sparse_attention",
    "causal_topk",
    "qk_norm_attention",
]
