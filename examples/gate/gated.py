"""The demo's attention with a gate beside it, and ways to attend."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from model import GPT, Attention
from torch import Tensor, nn

from tilework.attention import (
    BlockLayout,
    QKNormAttention,
    SeerGate,
    attention_lse,
    block_pooled_attention,
    block_sparse_attention,
    causal_topk,
    seer_gate_loss,
)


class Heads(NamedTuple):
    """What attention works on, all of shape ``(B, H, T, E)``."""

    query: Tensor  # before RoPE, for the gate
    key: Tensor
    turned_query: Tensor  # after RoPE, normalized and scaled
    turned_key: Tensor
    value: Tensor


Attend = Callable[["GatedAttention", Heads], Tensor]
Choose = Callable[["GatedAttention", Heads], BlockLayout]


def dense(module: "GatedAttention", heads: Heads) -> Tensor:
    """Attend to all keys, as the model was trained to."""
    query, key, value = heads[2:]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)


def distill(module: "GatedAttention", heads: Heads) -> Tensor:
    """Attend to all keys, and let the gate learn from where."""
    module.loss = seer_gate_loss(
        module.gate(heads.query, heads.key),
        true_map(module, heads, pool="max", normalize=True),
        reduction="rowmean",
    )
    return dense(module, heads)


def soft(module: "GatedAttention", heads: Heads) -> Tensor:
    """Attend to all keys, with the gate's log-probability of their block added to the scores.

    This way the loss of the language model reaches the gate.
    """
    size, length = module.gate.block_size, heads.query.shape[2]
    bias = module.gate(heads.query, heads.key).log_softmax(-1)
    bias = bias.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :length, :length]
    later = torch.ones(length, length, dtype=torch.bool, device=bias.device).triu(1)
    query, key, value = heads[2:]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.masked_fill(later, -torch.inf), scale=1.0
    )


def sparse(choose: Choose) -> Attend:
    """Attend to the chosen blocks only."""

    def attend(module: "GatedAttention", heads: Heads) -> Tensor:
        query, key, value = heads[2:]
        layout = choose(module, heads)
        output = block_sparse_attention(query, key, value, layout, is_causal=True, scale=1.0)
        assert isinstance(output, Tensor)
        return output

    return attend


class GatedAttention(nn.Module):
    """The demo's attention, which stays as it is, and a gate."""

    def __init__(self, attention: Attention, gate: SeerGate) -> None:
        super().__init__()
        self.attention, self.gate = attention, gate
        self.attend: Attend = dense
        self.loss: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Mix the positions of ``(B, T, width)``."""
        inner = self.attention
        assert isinstance(inner.attend, QKNormAttention)
        heads = inner.project_in(input).view(*input.shape[:2], 3, inner.heads, -1)
        query, key, value = heads.transpose(1, 3).unbind(2)
        turned_query = F.normalize(inner.rotate(query), dim=-1) * inner.attend.scale[:, None, None]
        turned_key = F.normalize(inner.rotate(key), dim=-1)
        mixed = self.attend(self, Heads(query, key, turned_query, turned_key, value))
        output: Tensor = inner.project_out(mixed.transpose(1, 2).flatten(2))
        return output


def add_gates(model: GPT, block_size: int) -> list[GatedAttention]:
    """Freeze a model and put a gate beside each of its attentions."""
    model.requires_grad_(False)
    modules = []
    for block in model.blocks:
        attention = block.attention
        assert isinstance(attention, Attention)
        features = attention.project_in.in_features // attention.heads
        gate = SeerGate(features, attention.heads, block_size=block_size, gate_dim=features)
        modules.append(GatedAttention(attention, gate.to(attention.project_in.weight.device)))
        block.attention = modules[-1]
    return modules


def true_map(module: GatedAttention, heads: Heads, *, pool: str, normalize: bool) -> Tensor:
    """The softmax map of dense attention, pooled in blocks."""
    query, key = heads.turned_query, heads.turned_key
    return block_pooled_attention(
        query,
        key,
        attention_lse(query, key, is_causal=True, scale=1.0),
        block_size=module.gate.block_size,
        is_causal=True,
        scale=1.0,
        pool=pool,
        normalize=normalize,
    )


def most_scored(scores: Tensor, block_size: int, density: float) -> BlockLayout:
    """The highest scores of each row, and the diagonal."""
    count = causal_topk(scores.shape[-1], density)
    return BlockLayout.from_scores_topk(scores, count, block_size, is_causal=True)


def choices(gates: dict[str, dict[GatedAttention, SeerGate]], density: float) -> dict[str, Choose]:
    """Ways to choose as many blocks: by the true map, by each set of gates, and by windows."""

    def by_mass(module: GatedAttention, heads: Heads) -> BlockLayout:
        scores = true_map(module, heads, pool="sum", normalize=False)
        return most_scored(scores, module.gate.block_size, density)

    def by_gate(name: str) -> Choose:
        def choose(module: GatedAttention, heads: Heads) -> BlockLayout:
            scores = gates[name][module](heads.query, heads.key)
            return most_scored(scores, module.gate.block_size, density)

        return choose

    def window(sinks: int) -> Choose:
        def choose(module: GatedAttention, heads: Heads) -> BlockLayout:
            length, size = heads.query.shape[2], module.gate.block_size
            others = causal_topk(-(-length // size), density) - 1  # beside the diagonal
            return BlockLayout.from_window(
                (length, length),
                size,
                left=max(0, others - sinks),
                num_sink_blocks=min(sinks, others),
                is_causal=True,
                device=heads.query.device,
            )

        return choose

    return {
        "the true map": by_mass,
        **{name: by_gate(name) for name in gates},
        "window": window(0),
        "window and first block": window(1),
    }
