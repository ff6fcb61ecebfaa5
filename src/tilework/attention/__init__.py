"""Attention."""

from tilework.attention.attention_column_mass import attention_column_mass
from tilework.attention.attention_entropy import attention_entropy
from tilework.attention.attention_lse import attention_lse
from tilework.attention.block_layout import BlockLayout, causal_topk
from tilework.attention.block_pooled_attention import block_pooled_attention
from tilework.attention.block_sparse import block_sparse_attention
from tilework.attention.block_sparse_attention_varlen import block_sparse_attention_varlen
from tilework.attention.merge_attention import merge_attention
from tilework.attention.qk_norm_attention import QKNormAttention, qk_norm_attention

__all__ = [
    "BlockLayout",
    "QKNormAttention",
    "attention_column_mass",
    "attention_entropy",
    "attention_lse",
    "block_pooled_attention",
    "block_sparse_attention",
    "block_sparse_attention_varlen",
    "causal_topk",
    "merge_attention",
    "qk_norm_attention",
]
