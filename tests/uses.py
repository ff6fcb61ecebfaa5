"""Calls as users write them, for mypy: results whose type depends on an argument."""

from typing import assert_type

from torch import Tensor

from tilework.attention import (
    BlockLayout,
    block_sparse_attention,
    block_sparse_attention_varlen,
    block_sparse_decode,
    paged_block_sparse_decode,
)
from tilework.losses import TopKGate, topk_softmax_gate
from tilework.norms import LayerNorm, RMSNorm, layer_norm, rms_norm

Pair = tuple[Tensor, Tensor]


def of_norms(x: Tensor, other: Tensor | None) -> Tensor:
    assert_type(rms_norm(x, 8), Tensor)
    assert_type(rms_norm(x, 8, residual=x), Pair)
    assert_type(rms_norm(x, 8, residual=other), Tensor | Pair)
    assert_type(layer_norm(x, 8, x, x), Tensor)
    assert_type(layer_norm(x, 8, residual=x), Pair)
    assert_type(layer_norm(x, 8, residual=other), Tensor | Pair)
    for norm in (RMSNorm(8), LayerNorm(8)):
        assert_type(norm.forward(x), Tensor)
        assert_type(norm.forward(x, x), Pair)
    return rms_norm(x, 8).sum() + layer_norm(x, 8).sum()


def of_attention(x: Tensor, layout: BlockLayout, starts: Tensor, flag: bool) -> Tensor:
    assert_type(block_sparse_attention(x, x, x, layout), Tensor)
    assert_type(block_sparse_attention(x, x, x, layout, return_lse=True), Pair)
    assert_type(block_sparse_attention(x, x, x, layout, return_lse=flag), Tensor | Pair)
    assert_type(block_sparse_attention_varlen(x, x, x, layout, starts), Tensor)
    assert_type(block_sparse_attention_varlen(x, x, x, layout, starts, return_lse=True), Pair)
    assert_type(
        block_sparse_attention_varlen(x, x, x, layout, starts, return_lse=flag), Tensor | Pair
    )
    return block_sparse_attention(x, x, x, layout).sum()


def of_decoding(x: Tensor, table: Tensor, flag: bool) -> Tensor:
    assert_type(block_sparse_decode(x, x, x), Tensor)
    assert_type(block_sparse_decode(x, x, x, return_lse=True), Pair)
    assert_type(block_sparse_decode(x, x, x, return_lse=flag), Tensor | Pair)
    assert_type(paged_block_sparse_decode(x, x, x, table, table), Tensor)
    assert_type(paged_block_sparse_decode(x, x, x, table, table, return_lse=True), Pair)
    assert_type(paged_block_sparse_decode(x, x, x, table, table, return_lse=flag), Tensor | Pair)
    return block_sparse_decode(x, x, x).sum()


def of_gates(x: Tensor, flag: bool) -> Tensor:
    assert_type(topk_softmax_gate(x, 2), TopKGate)
    assert_type(topk_softmax_gate(x, 2, dense=True), Tensor)
    assert_type(topk_softmax_gate(x, 2, dense=flag), TopKGate | Tensor)
    return topk_softmax_gate(x, 2).weights.sum()
