"""Attention."""

from tilework.attention.attention_column_mass import attention_column_mass
from tilework.attention.attention_entropy import attention_entropy
from tilework.attention.attention_lse import attention_lse
from tilework.attention.block_layout import BlockLayout, causal_topk
from tilework.attention.block_pooled_attention import block_pooled_attention
from tilework.attention.block_sparse import block_sparse_attention
from tilework.attention.block_sparse_attention_varlen import block_sparse_attention_varlen
from tilework.attention.block_sparse_decode import (
    block_sparse_decode,
    paged_block_sparse_decode,
)
from tilework.attention.merge_attention import merge_attention
from tilework.attention.qk_norm_attention import QKNormAttention, qk_norm_attention
from tilework.attention.seer_gate import SeerGate
from tilework.attention.seer_gate_cache import SeerGateCache
from tilework.attention.seer_gate_loss import seer_gate_loss

__all__ = [
    "BlockLayout",
    "QKNormAttention",
    "SeerGate",
    "SeerGateCache",
    "attention_column_mass",
    "attention_entropy",
    "attention_lse",
    "block_pooled_attention",
    "block_sparse_attention",
    "block_sparse_attention_varlen",
    "block_sparse_decode",
    "causal_topk",
    "merge_attention",
    "paged_block_sparse_decode",
    "qk_norm_attention",
    "seer_gate_loss",
]
