"""A byte-level GPT, and the two sets of parts that it is built from."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilework.attention import QKNormAttention
from tilework.losses import LinearCrossEntropy
from tilework.norms import RMSNorm

VOCABULARY = 256
Z_LOSS = 1e-4


class TorchRMSNorm(nn.RMSNorm):
    """RMS normalization of a residual sum."""

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the norm of the sum, and the sum."""
        total = input + residual
        return super().forward(total), total


class TorchQKNormAttention(nn.Module):
    """Attention by cosine similarity times a learned scale per head."""

    def __init__(self, seq_length: int, *, num_heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((num_heads,), math.log2(seq_length**2 - seq_length)))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
        """Mix the values; all of shape ``(B, H, T, E)``."""
        query = F.normalize(query.float(), dim=-1) * self.scale[:, None, None]
        key = F.normalize(key.float(), dim=-1)
        return F.scaled_dot_product_attention(
            query.type_as(value), key.type_as(value), value, is_causal=is_causal, scale=1.0
        )


class TorchLinearCrossEntropy(nn.Module):
    """Cross-entropy of the stored logits of the next byte, with a z-loss."""

    def __init__(self, *, shift: int, z_loss: float = 0.0) -> None:
        super().__init__()
        self.shift, self.z_loss = shift, z_loss

    def forward(self, input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        """Return the mean over the positions that have a next byte."""
        logits = F.linear(input[:, : -self.shift], linear_weight).float().flatten(0, 1)
        loss = F.cross_entropy(logits, target[:, self.shift :].flatten())
        return loss + self.z_loss * logits.logsumexp(-1).square().mean()


@dataclass(frozen=True)
class Parts:
    """What the two models do not share."""

    norm: Callable[[int], nn.Module]
    attention: Callable[..., nn.Module]
    loss: Callable[..., nn.Module]


PARTS = {
    "tilework": Parts(RMSNorm, QKNormAttention, LinearCrossEntropy),
    "torch": Parts(TorchRMSNorm, TorchQKNormAttention, TorchLinearCrossEntropy),
}


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    rotation: Tensor

    def __init__(self, width: int, heads: int, context: int, parts: Parts) -> None:
        super().__init__()
        self.heads = heads
        self.project_in = nn.Linear(width, 3 * width, bias=False)
        self.attend = parts.attention(context, num_heads=heads)
        frequency = 10_000.0 ** -torch.linspace(0, 1, width // heads // 2)
        angle = torch.arange(context)[:, None] * frequency
        self.register_buffer("rotation", torch.polar(torch.ones_like(angle), angle), False)
        self.project_out = nn.Linear(width, width, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Mix the positions of ``(B, T, width)``."""
        heads = self.project_in(input).view(*input.shape[:2], 3, self.heads, -1)
        query, key, value = heads.transpose(1, 3).unbind(2)
        mixed = self.attend(self.rotate(query), self.rotate(key), value, is_causal=True)
        output: Tensor = self.project_out(mixed.transpose(1, 2).flatten(2))
        return output

    def rotate(self, input: Tensor) -> Tensor:
        """Turn pairs of features by angles that grow with the position (RoPE)."""
        pairs = torch.view_as_complex(input.float().reshape(*input.shape[:-1], -1, 2))
        turned = torch.view_as_real(pairs * self.rotation[: input.shape[-2]])
        return turned.flatten(-2).type_as(input)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, context: int, parts: Parts) -> None:
        super().__init__()
        self.attention_norm = parts.norm(width)
        self.attention = Attention(width, heads, context, parts)
        self.mlp_norm = parts.norm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, stream: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """Add the last block's update to the residual stream, and return it with the next."""
        normed, stream = self.attention_norm(stream, residual=update)
        normed, stream = self.mlp_norm(stream, residual=self.attention(normed))
        return stream, self.mlp(normed)


class GPT(nn.Module):
    """A language model whose head is its embedding's weight."""

    def __init__(self, width: int, depth: int, heads: int, context: int, parts: Parts) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, heads, context, parts) for _ in range(depth))
        self.norm = parts.norm(width)
        self.loss = parts.loss(shift=1, z_loss=Z_LOSS)
        self.validation_loss = parts.loss(shift=1)
        for weight in (parameter for parameter in self.parameters() if parameter.dim() == 2):
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the hidden states ``(B, T, width)`` of bytes ``(B, T)``."""
        stream = self.embedding(tokens)
        update = torch.zeros_like(stream)
        for block in self.blocks:
            stream, update = block(stream, update)
        hidden: Tensor = self.norm(stream, residual=update)[0]
        return hidden
