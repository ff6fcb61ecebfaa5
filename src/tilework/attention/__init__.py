"""Attention."""

from tilework.attention.block_layout import BlockLayout, causal_topk
from tilework.attention.block_sparse import block_sparse_attention
from tilework.attention.block_sparse_decode import (
    block_sparse_decode,
    paged_block_sparse_decode,
)
from tilework.attention.qk_norm_attention import QKNormAttention, qk_norm_attention
from tilework.attention.seer_gate import SeerGate
from tilework.attention.seer_gate_cache import SeerGateCache
from tilework.attention.seer_gate_loss import seer_gate_loss

__all__ = [
    "BlockLayout",
    "QKNormAttention",
    "SeerGate",
    "SeerGateCache",
    "block_sparse_attention",
    "block_sparse_decode",
    "causal_topk",
    "paged_block_sparse_decode",
    "qk_norm_attention",
    "seer_gate_loss",
]
