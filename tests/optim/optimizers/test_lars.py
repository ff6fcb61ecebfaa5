"""LARS: what is peculiar to it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.optim import LARS

import samples
from optim.samples import Optimized, Options, draw_gradients


def definition(p: Tensor, g: Tensor, state: dict[str, Tensor], options: Options, t: int) -> Tensor:
    lr, momentum = float(options["lr"]), options["momentum"]
    decay, ratio = options["weight_decay"], 1.0
    if options["exclude_1d"] and p.ndim <= 1:
        decay = 0.0
    else:
        size = sum(x * x for x in p.flatten()) ** 0.5
        change = sum(x * x for x in g.flatten()) ** 0.5 + decay * size
        if size > 0 and change > 0:
            ratio = options["trust_coefficient"] * size / (change + options["eps"])
    q = lr * ratio * (g + decay * p)
    b = momentum * state.get("momentum_buffer", torch.zeros_like(p)) + q
    state["momentum_buffer"] = b
    return p - (q + momentum * b if options["nesterov"] else b)


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            LARS,
            definition,
            options=(
                {"weight_decay": 0.1},
                {"lr": 0.3, "momentum": 0.5, "trust_coefficient": 0.2, "nesterov": True},
                {"momentum": 0.0, "eps": 0.3, "exclude_1d": False, "weight_decay": 0.2},
            ),
            standard_decay=False,
            elementwise=False,
            refuses=(
                (
                    "nesterov must be False without a momentum",
                    ValueError,
                    {"nesterov": True, "momentum": 0.0},
                ),
                (
                    "trust_coefficient must be a finite number above 0",
                    ValueError,
                    {"trust_coefficient": 0.0},
                ),
                ("exclude_1d must be True or False", TypeError, {"exclude_1d": 1}),
            ),
        )
    ]


@given(st.floats(1e-3, 1e3))
def test_the_scale_of_gradients_does_not_matter(scale: float) -> None:
    start = torch.randn(4, 3, dtype=torch.float64)
    gradients = torch.randn(3, 4, 3, dtype=torch.float64)
    results = []
    for factor in (1.0, scale):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = LARS([parameter], eps=0.0)
        for gradient in gradients:
            parameter.grad = factor * gradient
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-13, atol=0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_excluded_tensors_follow_sgd(nesterov: bool) -> None:
    start = torch.randn(7, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = LARS([ours], lr=0.1, weight_decay=0.3, nesterov=nesterov)
    other = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=nesterov)
    for _ in range(4):
        draw_gradients([ours])
        theirs.grad = ours.grad
        optimizer.step()
        other.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
    buffer = other.state[theirs]["momentum_buffer"]
    torch.testing.assert_close(optimizer.state[ours]["momentum_buffer"], 0.1 * buffer)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"eps": 0.0}])
def test_weights_of_zero_have_the_ratio_one(options: dict[str, Any]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = LARS([parameter], lr=0.5, **options)
    draw_gradients([parameter])
    assert parameter.grad is not None
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), -0.5 * parameter.grad)


def test_nothing_moves_without_gradients_and_decay() -> None:
    parameter = torch.nn.Parameter(torch.randn(2, 3))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros(2, 3)
    LARS([parameter], lr=0.5, eps=0.0).step()
    assert torch.equal(parameter, before)


def test_the_buffer_holds_the_rate() -> None:
    """A new rate acts on new gradients alone."""
    parameter = torch.nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
    optimizer = LARS([parameter], lr=0.5)
    draw_gradients([parameter])
    optimizer.step()
    moved = optimizer.state[parameter]["momentum_buffer"].clone()
    optimizer.param_groups[0]["lr"] = 0.0
    before = parameter.detach().clone()
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), before - 0.9 * moved)
