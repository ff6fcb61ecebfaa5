"""The optimizers that the demo can train with, each at the rate that a sweep found best."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tilework import optim

Parameters = Iterable[nn.Parameter]


@dataclass(frozen=True)
class Choice:
    """An optimizer, its rate and its other options."""

    kind: Callable[..., torch.optim.Optimizer]
    rate: float
    options: dict[str, Any] = field(default_factory=dict)
    takes_loss: bool = False

    def make(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """The optimizer of a model's parameters."""
        return self.kind(model.parameters(), rate, **self.options)


ADAM = {"betas": (0.9, 0.99), "eps": 1e-6}

CHOICES = {
    "adamw": Choice(optim.AdamW, 5e-4, ADAM),
    "lion": Choice(optim.Lion, 1e-4, {"weight_decay": 0.1}),
    "sgdw": Choice(optim.SGDW, 0.1, {"momentum": 0.9}),
}
