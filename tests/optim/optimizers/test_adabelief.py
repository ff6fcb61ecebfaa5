"""AdaBelief: what is peculiar to it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.optim import AdaBelief

import samples
from optim.samples import Optimized, Options, decay, draw_gradients


def definition(p: Tensor, g: Tensor, state: dict[str, Tensor], options: Options, t: int) -> Tensor:
    beta1, beta2 = options["betas"]
    eps, zeros, rest = options["eps"], torch.zeros_like(p), p
    if options["weight_decouple"]:
        rest = p - decay(options) * p
    else:
        g = g + options["weight_decay"] * p
    m = state["exp_avg"] = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * g
    s = beta2 * state.get("exp_avg_var", zeros) + (1 - beta2) * (g - m) ** 2 + eps
    state["exp_avg_var"] = s
    u = m / (1 - beta1**t)
    adapted = u / ((s / (1 - beta2**t)).sqrt() + eps)
    if not options["rectify"]:
        return rest - float(options["lr"]) * adapted
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * t * beta2**t / (1 - beta2**t)
    if rho > 5:
        r = ((rho - 4) / (limit - 4) * (rho - 2) / (limit - 2) * limit / rho) ** 0.5
        u = adapted * r
    return rest - float(options["lr"]) * u


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            AdaBelief,
            definition,
            options=(
                {},
                {"lr": 0.1, "betas": (0.5, 0.8), "eps": 1e-2, "weight_decay": 0.3},
                {"weight_decouple": False, "weight_decay": 0.2, "lr": 0.1},
                {"rectify": True, "betas": (0.5, 0.999), "eps": 1e-8},
                {"lr": 0.02, "weight_decay": 0.1, "decouple_lr": True, "reference_lr": 0.1},
            ),
            is_complex=True,
            standard_decay=False,
            refuses=(
                (
                    "decouple_lr must be False",
                    ValueError,
                    {"decouple_lr": True, "weight_decouple": False},
                ),
                ("rectify must be True or False", TypeError, {"rectify": 1}),
                ("weight_decouple must be True or False", TypeError, {"weight_decouple": None}),
            ),
        )
    ]


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.6, 0.7, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("capturable", [False, True])
def test_rectified_steps_are_those_of_radam(beta2: float, capturable: bool) -> None:
    """Over the first step that adapts; RAdam is given mean and variance for its moments."""
    parameter = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.5, beta2), "eps": 0.0}
    optimizer = AdaBelief([parameter], rectify=True, capturable=capturable, **options)
    twin = torch.nn.Parameter(parameter.detach().clone())
    other = torch.optim.RAdam([twin], **options)
    twin.grad = torch.zeros_like(twin)
    mean = variance = torch.zeros(5, dtype=torch.float64)
    for t in range(12):
        draw_gradients([parameter])
        assert parameter.grad is not None
        mean = (mean + parameter.grad) / 2
        variance = beta2 * variance + (1 - beta2) * (parameter.grad - mean) ** 2
        other.state[twin] = {
            "step": torch.tensor(float(t)),
            "exp_avg": 2 * mean,
            "exp_avg_sq": variance / max(beta2, 1e-300),
        }
        optimizer.step()
        other.step()
        torch.testing.assert_close(parameter, twin, rtol=1e-12, atol=1e-13)


def test_zero_gradients_move_nothing() -> None:
    for options in ({}, {"rectify": True}, {"weight_decouple": False}):
        parameter = torch.nn.Parameter(torch.randn(5))
        before = parameter.detach().clone()
        optimizer = AdaBelief([parameter], **options)
        for _ in range(8):
            parameter.grad = torch.zeros(5)
            optimizer.step()
        assert torch.equal(parameter, before)


def test_the_first_step_is_that_of_the_sign() -> None:
    parameter = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    draw_gradients([parameter])
    assert parameter.grad is not None
    AdaBelief([parameter], lr=0.18, betas=(0.9, 0.999), eps=0.0).step()
    expected = -0.2 * parameter.grad.sign()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-13, atol=0)


def test_a_constant_gradient_leaves_epsilons_alone() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = AdaBelief([parameter], betas=(0.5, 0.9), eps=1e-6)
    for _ in range(500):
        parameter.grad = torch.tensor([1.0, -2.0, 30.0], dtype=torch.float64)
        optimizer.step()
    s = optimizer.state[parameter]["exp_avg_var"]
    torch.testing.assert_close(s, torch.full_like(s, 1e-6 / (1 - 0.9)), rtol=1e-9, atol=0)


@given(st.floats(1e-3, 1e3))
def test_the_scale_of_gradients_does_not_matter(scale: float) -> None:
    start = torch.randn(6, dtype=torch.float64)
    gradients = torch.randn(4, 6, dtype=torch.float64)
    results = []
    for factor in (1.0, scale):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = AdaBelief([parameter], lr=0.1, eps=0.0, weight_decay=0.1)
        for gradient in gradients:
            parameter.grad = factor * gradient
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)
