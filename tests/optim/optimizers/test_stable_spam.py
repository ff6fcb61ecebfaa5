"""StableSPAM: what is peculiar to it."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.optim import AdamW, StableSPAM

import samples
from optim.samples import Optimized, Options, draw_gradients


def definition(p: Tensor, g: Tensor, state: dict[str, Tensor], options: Options, t: int) -> Tensor:
    beta1, beta2 = options["betas"]
    gamma1, gamma2, theta = options["gamma1"], options["gamma2"], options["theta"]
    T, q = options["total_steps"], 1.0
    if T is not None:
        low = options["eta_min"]
        q = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(t, T) / (T + 1)))
    beta1, gamma1 = q * beta1, q * gamma1
    zeros, zero = torch.zeros_like(p), p.new_zeros(())

    x = max((abs(e) for e in g.flatten()), default=zero)
    A = state["max_ema"] = theta * state.get("max_ema", zero) + (1 - theta) * x
    cap = A / (1 - theta**t)
    g = torch.where(g.abs() > cap, g * cap / x, g)

    n = sum((e * e for e in g.flatten()), zero) ** 0.5
    M = state["norm_ema"] = gamma1 * state.get("norm_ema", zero) + (1 - gamma1) * n
    N = state["norm_sq_ema"] = gamma2 * state.get("norm_sq_ema", zero) + (1 - gamma2) * n * n
    c = M / (1 - gamma1**t) / ((N / (1 - gamma2**t)) ** 0.5 + options["eps"])
    if n > 0:
        g = g / n * c

    m, v = state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros)
    k = state.get("moment_step", zero)
    if options["reset_interval"] > 0 and t % options["reset_interval"] == 0:
        m, v, k = zeros, zeros, zero
    k = state["moment_step"] = k + (p.numel() > 0)  # nothing counts where nothing is
    m = state["exp_avg"] = beta1 * m + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * v + (1 - beta2) * g * g
    mean, square = m / (1 - beta1 ** float(k)), v / (1 - beta2 ** float(k))
    return p - float(options["lr"]) * mean / (square.sqrt() + options["eps"]) if p.numel() else p


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            StableSPAM,
            definition,
            options=(
                {"weight_decay": 0.2, "reset_interval": 0},
                {"lr": 0.1, "betas": (0.5, 0.8), "eps": 1e-2, "reset_interval": 2, "theta": 0.3}
                | {"weight_decay": 0.1, "decouple_lr": True, "reference_lr": 0.4},
                {"lr": 0.1, "gamma1": 0.2, "gamma2": 0.4, "reset_interval": 3, "theta": 0.0}
                | {"total_steps": 2, "eta_min": 0.25},
            ),
            shapes=((7,), (3, 5), (), (0,)),
            elementwise=False,
            refuses=(
                ("gamma1 must be a number of at least 0", ValueError, {"gamma1": 1.0}),
                ("gamma2 must be a number of at least 0", ValueError, {"gamma2": -0.1}),
                ("theta must be a number of at least 0", ValueError, {"theta": 1.0}),
                ("reset_interval must be an int of at least 0", ValueError, {"reset_interval": -1}),
                ("reset_interval must be an int", TypeError, {"reset_interval": 1.5}),
                ("total_steps must be an int of at least 1", ValueError, {"total_steps": 0}),
                ("eta_min must be a number from 0 to 1", ValueError, {"eta_min": 1.5}),
            ),
        )
    ]


def state_of(optimizer: StableSPAM) -> dict[str, Tensor]:
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


def test_spikes_are_cut_to_the_usual_size() -> None:
    """Without memory in the moments, they hold the filtered gradient."""
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    options: dict[str, Any] = {"betas": (0.0, 0.0), "gamma1": 0.0, "gamma2": 0.0, "eps": 0.0}
    optimizer = StableSPAM([parameter], theta=0.5, **options)
    parameter.grad = torch.tensor([1.0, -1.0, 0.5, -0.25], dtype=torch.float64)
    optimizer.step()
    parameter.grad = torch.tensor([8.0, -6.0, 0.5, -0.25], dtype=torch.float64)
    optimizer.step()
    usual = (0.5 * 1 + 8) / 1.5  # 0.5 * (0.5 * 1) + 0.5 * 8, without the bias of 1 - 0.5 ** 2
    cut = torch.tensor([usual, -6 * usual / 8, 0.5, -0.25], dtype=torch.float64)
    direction = state_of(optimizer)["exp_avg"]
    assert torch.equal(direction.sign(), parameter.grad.sign())
    torch.testing.assert_close(direction / direction.norm(), cut / cut.norm(), rtol=1e-14, atol=0)


@given(st.floats(0.1, 10))
def test_gradients_of_constant_norm_keep_the_direction_alone(norm: float) -> None:
    """The filtered gradient has norm one, which the moments hold where they have no memory."""
    parameter = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = StableSPAM([parameter], betas=(0.0, 0.0), theta=0.0, eps=0.0)
    for _ in range(4):
        draw_gradients([parameter])
        assert parameter.grad is not None
        direction = torch.nn.functional.normalize(parameter.grad, dim=0)
        parameter.grad = norm * direction
        optimizer.step()
        torch.testing.assert_close(state_of(optimizer)["exp_avg"], direction, rtol=1e-12, atol=0)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_a_reset_is_a_first_step_of_adam(interval: int, capturable: bool) -> None:
    """On the filtered gradient, whatever the moments were."""
    parameter = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = StableSPAM([parameter], lr=0.1, reset_interval=interval, capturable=capturable)
    expected = 0
    for t in range(1, 8):
        draw_gradients([parameter])
        assert parameter.grad is not None
        before = parameter.detach().clone()
        if t % interval == 0:
            expected = 0
            state = state_of(optimizer)
            if state:
                state["exp_avg"].fill_(torch.nan)
                state["exp_avg_sq"].fill_(torch.nan)
        expected += 1
        optimizer.step()
        assert float(state_of(optimizer)["moment_step"]) == expected
        if t % interval == 0:
            change = parameter.detach() - before
            torch.testing.assert_close(change, -0.1 * parameter.grad.sign(), rtol=1e-5, atol=0)


def test_between_resets_it_is_adam_on_the_filtered_gradient() -> None:
    """Which is the gradient itself, scaled, where its elements and norm are as usual."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))
    optimizers = (
        StableSPAM([ours], lr=0.1, eps=1e-3, reset_interval=4),
        AdamW([theirs], lr=0.1, eps=1e-3, weight_decay=0.0),
    )
    for t in range(1, 8):
        signs = torch.randn(4, dtype=torch.float64).sign()
        ours.grad = 3.0 * signs
        theirs.grad = 6 / (6 + 1e-3) / 2 * signs
        if t == 4:
            optimizers[1].state.clear()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_zero_gradients_move_nothing_but_decay() -> None:
    parameter = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    before = parameter.detach().clone()
    optimizer = StableSPAM([parameter], lr=0.1, weight_decay=0.2, reset_interval=2)
    for _ in range(3):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    expected = before * (1 - 0.02) ** 3
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-14, atol=0)


@given(st.floats(1e-3, 1e3))
def test_the_scale_of_gradients_does_not_matter(scale: float) -> None:
    start = torch.randn(4, 3, dtype=torch.float64)
    gradients = torch.randn(5, 4, 3, dtype=torch.float64)
    results = []
    for factor in (1.0, scale):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = StableSPAM([parameter], lr=0.1, eps=0.0, reset_interval=3, weight_decay=0.1)
        for gradient in gradients:
            parameter.grad = factor * gradient
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_counter_is_float32_in_every_dtype(dtype: torch.dtype) -> None:
    """In bfloat16 it would stop at 256."""
    parameter = torch.nn.Parameter(torch.randn(3).to(dtype))
    optimizer = StableSPAM([parameter], reset_interval=0, state_dtype=torch.bfloat16)
    for _ in range(260):
        draw_gradients([parameter])
        optimizer.step()
    state = state_of(optimizer)
    assert state["moment_step"].dtype == torch.float32
    assert float(state["moment_step"]) == 260
    assert state["max_ema"].dtype == torch.bfloat16
