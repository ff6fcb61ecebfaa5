"""AdamATan2: what is peculiar to it."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.optim import AdamATan2, AdamW

import samples
from optim.samples import Optimized, Options, draw_gradients


def definition(p: Tensor, g: Tensor, state: dict[str, Tensor], options: Options, t: int) -> Tensor:
    beta1, beta2 = options["betas"]
    zeros = torch.zeros_like(p)
    m = state["exp_avg"] = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * g**2
    y, x = m / (1 - beta1**t), options["b"] * (v / (1 - beta2**t)).sqrt()
    angle = 2 * torch.atan(y / ((x**2 + y**2).sqrt() + x)) if p.numel() else zeros
    return p - float(options["lr"]) * options["a"] * angle


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            AdamATan2,
            definition,
            options=(
                {},
                {"lr": 0.1, "betas": (0.5, 0.8), "a": 0.7, "b": 3.0, "weight_decay": 0.3},
                {"lr": 0.02, "weight_decay": 0.1, "decouple_lr": True, "reference_lr": 0.1},
            ),
            is_complex=True,
            rounds_alike=False,  # torch.atan2 differs in the last elements of a tensor
            refuses=(
                ("a must be a finite number of at least 0", ValueError, {"a": -1.0}),
                ("b must be a finite number of at least 0", ValueError, {"b": -1.0}),
            ),
        )
    ]


@given(st.floats(1e-9, 1e9))
def test_the_scale_of_gradients_does_not_matter(scale: float) -> None:
    start = torch.randn(6, dtype=torch.float64)
    gradients = torch.randn(4, 6, dtype=torch.float64)
    results = []
    for factor in (1.0, scale):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = AdamATan2([parameter], lr=0.1, weight_decay=0.1)
        for gradient in gradients:
            parameter.grad = factor * gradient
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-14)


@given(st.lists(st.floats(-1e18, 1e18), min_size=1, max_size=5))
def test_no_step_is_longer_than_a_quarter_turn(gradients: list[float]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = AdamATan2([parameter], lr=0.5)
    for gradient in gradients:
        before = parameter.item()
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        assert abs(parameter.item() - before) <= 0.5 * 1.27 * math.pi / 2 + 1e-5


def test_the_first_step_is_that_of_the_sign() -> None:
    parameter = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    draw_gradients([parameter])
    assert parameter.grad is not None
    AdamATan2([parameter], lr=0.25, a=4 / math.pi).step()
    expected = -0.25 * parameter.grad.sign()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-14, atol=0)


def test_nothing_moves_where_all_is_zero() -> None:
    parameter = torch.nn.Parameter(torch.randn(5))
    before = parameter.detach().clone()
    optimizer = AdamATan2([parameter], lr=0.25)
    for _ in range(2):
        parameter.grad = torch.zeros(5)
        optimizer.step()
    assert torch.equal(parameter, before)


def test_squares_that_underflow_leave_a_quarter_turn() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1e-30, -1e-30])
    AdamATan2([parameter], lr=1.0, a=1.0).step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-1.0, 1.0]) * math.pi / 2)


def test_a_large_denominator_is_adam() -> None:
    start = torch.randn(9, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (
        AdamATan2([ours], lr=1e-3, a=1e6, b=1e6),
        AdamW([theirs], lr=1e-3, betas=(0.9, 0.99), eps=0.0, weight_decay=0.0),
    )
    for _ in range(4):
        draw_gradients([ours])
        theirs.grad = ours.grad
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
