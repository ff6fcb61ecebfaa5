"""Small networks with what real ones have."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Three projections of the same tensor, and one of the result."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.out = nn.Linear(width, width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        mixed = torch.softmax(self.query(input) @ self.key(input).mT, -1) @ self.value(input)
        return self.out(mixed)


class Network(nn.Module):
    """Attention, two layers with dropout, one that is never called, and a tied head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(width, width)
        self.down = nn.Linear(2 * width, width)
        self.attention = Attention(width)
        self.up = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.attention(x)
        return self.head(self.down(self.dropout(F.relu(self.up(x)))))


ORDER = ["attention.query", "attention.key", "attention.value", "attention.out", "up", "down"]
"""In which the network calls the layers that can be quantized."""


def network(**options: Any) -> Network:
    torch.manual_seed(0)
    return Network(**options).train()


def ids(batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 20, (4, 6), generator=generator) for _ in range(batches)]


def inputs_of(model: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """All rows that reach a layer, in the order of arrival."""
    rows: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(
        lambda _, args, output: rows.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for batch in batches:
            model.eval()(batch)
    handle.remove()
    return torch.cat(rows)


def hessian(rows: Tensor) -> Tensor:
    """Computed at once, in float64."""
    rows = rows.double()
    return 2 / len(rows) * rows.mT @ rows
