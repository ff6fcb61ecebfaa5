"""SGDW: what is peculiar to it."""

import pytest
import torch
from torch import Tensor

from tilework.optim import SGDW

import samples
from optim.samples import Optimized, Options, draw_gradients


def definition(p: Tensor, g: Tensor, state: dict[str, Tensor], options: Options, t: int) -> Tensor:
    momentum, u = options["momentum"], g
    if momentum > 0:
        b = g if t == 1 else momentum * state["momentum_buffer"] + (1 - options["dampening"]) * g
        state["momentum_buffer"] = b.clone()
        u = g + momentum * b if options["nesterov"] else b
    return p - float(options["lr"]) * u


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            SGDW,
            definition,
            options=(
                {},
                {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.3},
                {"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
            ),
            is_complex=True,
            refuses=(
                ("nesterov must be False without a momentum", ValueError, {"nesterov": True}),
                (
                    "nesterov must be False",
                    ValueError,
                    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
                ),
                ("dampening must be a number from 0 to 1", ValueError, {"dampening": 1.1}),
            ),
        )
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
    ],
)
def test_is_sgd_without_decay(options: dict[str, float]) -> None:
    start = torch.randn(5, 3, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = SGDW([ours], lr=0.1, **options), torch.optim.SGD([theirs], lr=0.1, **options)
    for _ in range(4):
        draw_gradients([ours])
        theirs.grad = ours.grad
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


def test_without_momentum_the_decay_is_that_of_the_square() -> None:
    start = torch.randn(5, 3, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (
        SGDW([ours], lr=0.1, weight_decay=0.2),
        torch.optim.SGD([theirs], lr=0.1, weight_decay=0.2),
    )
    for _ in range(4):
        draw_gradients([ours])
        theirs.grad = ours.grad
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
