"""LAMB: what is peculiar to it."""

import pytest
import torch
from torch import Tensor

from tilework.optim import LAMB

import samples
from optim.samples import Optimized, Options, draw_gradients


def definition(p: Tensor, g: Tensor, state: dict[str, Tensor], options: Options, t: int) -> Tensor:
    beta1, beta2 = options["betas"]
    zeros = torch.zeros_like(p)
    m = state["exp_avg"] = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * g**2
    if options["bias_correction"]:
        m, v = m / (1 - beta1**t), v / (1 - beta2**t)
    u = m / (v.sqrt() + options["eps"])
    if options["exclude_1d"] and p.ndim <= 1:
        return p - float(options["lr"]) * u
    u = u + options["weight_decay"] * p
    size, length = (sum(x * x for x in tensor.flatten()) ** 0.5 for tensor in (p, u))
    ratio = 1.0
    if size > 0 and length > 0:
        low, high = options["clip_norm"] or (0, torch.inf)
        ratio = min(max(size, low), high) / length
    return p - float(options["lr"]) * ratio * u


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            LAMB,
            definition,
            options=(
                {},
                {"lr": 0.1, "betas": (0.5, 0.8), "eps": 1e-2, "weight_decay": 0.3},
                {"clip_norm": (0.1, 2.0), "bias_correction": False, "lr": 0.1},
                {"clip_norm": (5.0, 5.0), "exclude_1d": False, "weight_decay": 0.1},
            ),
            standard_decay=False,
            elementwise=False,
            refuses=(
                (
                    "clip_norm must be a norm and one at least as large, got",
                    ValueError,
                    {"clip_norm": (2.0, 1.0)},
                ),
                ("clip_norm must be two numbers", ValueError, {"clip_norm": (1.0,)}),
                (r"clip_norm\[0\] must be", ValueError, {"clip_norm": (-1.0, 1.0)}),
                ("bias_correction must be True or False", TypeError, {"bias_correction": 1}),
            ),
        )
    ]


@pytest.mark.parametrize("clip_norm", [None, (0.0, 1.0), (7.0, 9.0)])
def test_a_tensor_moves_by_the_rate_times_its_norm(clip_norm: tuple[float, float] | None) -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    optimizer = LAMB([parameter], lr=0.25, weight_decay=0.1, clip_norm=clip_norm)
    for _ in range(3):
        before = parameter.detach().clone()
        draw_gradients([parameter])
        optimizer.step()
        low, high = clip_norm or (0.0, torch.inf)
        expected = 0.25 * min(max(float(before.norm()), low), high)
        assert float((parameter.detach() - before).norm()) == pytest.approx(expected, rel=1e-13)


def test_excluded_tensors_follow_adam() -> None:
    start = torch.randn(7, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (
        LAMB([ours], lr=0.1, weight_decay=0.3),
        torch.optim.Adam([theirs], lr=0.1, eps=1e-6),
    )
    for _ in range(4):
        draw_gradients([ours])
        theirs.grad = ours.grad
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


def test_weights_of_zero_have_the_ratio_one() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    optimizer = LAMB([parameter], lr=0.5, clip_norm=(1.0, 2.0))
    draw_gradients([parameter])
    assert parameter.grad is not None
    optimizer.step()
    g = parameter.grad
    torch.testing.assert_close(parameter.detach(), -0.5 * g / (g.abs() + 1e-6), rtol=1e-13, atol=0)


def test_nothing_moves_without_gradients_and_decay() -> None:
    parameter = torch.nn.Parameter(torch.randn(2, 3))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros(2, 3)
    LAMB([parameter], lr=0.5, clip_norm=(1.0, 2.0)).step()
    assert torch.equal(parameter, before)
