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
    amplifies: float = 1.0
    """How much further than by AdamW rounding errors let two exact models part."""

    def make(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """The optimizer of a model's parameters."""
        return self.kind(model.parameters(), rate, **self.options)


def steepest(parameters: Parameters, lr: float, **options: Any) -> torch.optim.Optimizer:
    """Spectral descent for matrices, of a tenth of the rate by signs for what is none."""
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() >= 2]
    others = [p for p in parameters if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "norm": "rms"},
        {"params": others, "norm": "linf", "sensitivity": 10.0},
    ]
    return optim.SteepestDescent(groups, lr, **options)


def normalized(parameters: Parameters, lr: float, **options: Any) -> torch.optim.Optimizer:
    """AdamW, which after some steps keeps the norms of matrices."""
    return optim.LAWN(optim.AdamW(parameters, lr, weight_decay=0.0, **options), free_steps=50)


ADAM = {"betas": (0.9, 0.99), "eps": 1e-6}
MOMENTUM = {"momentum": 0.9}

CHOICES = {
    "adamw": Choice(optim.AdamW, 5e-4, ADAM),
    "lion": Choice(optim.Lion, 1e-3, {"weight_decay": 0.1}),
    "sgdw": Choice(optim.SGDW, 0.2, MOMENTUM),
    "adafactor": Choice(optim.Adafactor, 0.1, {"relative_step": False}),
    "adam_atan2": Choice(optim.AdamATan2, 4e-3),
    "adabelief": Choice(optim.AdaBelief, 2e-3),
    "adamp": Choice(optim.AdamP, 2e-3, ADAM),
    "sgdp": Choice(optim.SGDP, 0.2, MOMENTUM),
    "stable_spam": Choice(optim.StableSPAM, 2e-3),
    "steepest_descent": Choice(steepest, 0.025, MOMENTUM | {"nesterov": True}),
    "fadam": Choice(optim.FAdam, 2e-3),
    "lamb": Choice(optim.LAMB, 0.02),
    "lars": Choice(optim.LARS, 0.5, {"trust_coefficient": 0.02}),
    "lawn": Choice(normalized, 4e-3, ADAM),
    "ada_grad_norm": Choice(optim.AdaGradNorm, 4.0),
    "alrsmag": Choice(optim.ALRSMAG, 0.2, {"lower_bound": 1.0}, takes_loss=True, amplifies=50.0),
    "alrshb": Choice(optim.ALRSHB, 0.1, {"lower_bound": 1.0}, takes_loss=True, amplifies=50.0),
}
