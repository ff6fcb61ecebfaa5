"""FAdam: what is peculiar to it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.optim import FAdam

import samples
from optim.samples import Optimized, Options, draw_gradients


def size(x: Tensor) -> float:
    return float((sum(float(e) ** 2 for e in x.flatten()) / max(x.numel(), 1)) ** 0.5)


def definition(p: Tensor, g: Tensor, state: dict[str, Tensor], options: Options, t: int) -> Tensor:
    beta1, beta2 = options["betas"]
    zeros = torch.zeros_like(p)
    beta = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
    F = state["fim"] = beta * state.get("fim", zeros) + (1 - beta) * g**2
    eps = min(options["eps"], options["eps2"] * size(g)) if size(g) > 0 else options["eps"]
    D = F ** options["p"] + eps ** (2 * options["p"])
    h, w = g / D, p / D
    h, w = (x / max(1.0, size(x) / options["clip"]) for x in (h, w))
    m = state["exp_avg"] = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * h
    return p - float(options["lr"]) * (m + options["weight_decay"] * w)


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            FAdam,
            definition,
            options=(
                {},
                {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1, "weight_decay": 0.3, "clip": 0.5},
                {"lr": 0.1, "eps": 1.0, "eps2": 0.3, "p": 0.7, "clip": 5.0},
                {"lr": 0.1, "p": 1.0, "betas": (0.9, 0.0), "weight_decay": 0.0},
            ),
            standard_decay=False,
            elementwise=False,
            refuses=(
                ("p must be a finite number above 0", ValueError, {"p": 0.0}),
                ("clip must be a finite number above 0", ValueError, {"clip": 0.0}),
                ("eps2 must be a finite number of at least 0", ValueError, {"eps2": -0.1}),
            ),
        )
    ]


def test_natural_gradients_are_at_first_signs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    draw_gradients([parameter])
    assert parameter.grad is not None
    optimizer = FAdam([parameter], lr=0.2, betas=(0.5, 0.999), eps=0.0, clip=7.0)
    optimizer.step()
    expected = -0.1 * parameter.grad.sign()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-14, atol=0)


@given(st.floats(0.05, 2), st.floats(0.1, 1))
def test_natural_gradients_are_clipped(clip: float, p: float) -> None:
    parameter = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    options = {"betas": (0.0, 0.9), "weight_decay": 0.0}
    optimizer = FAdam([parameter], lr=1.0, clip=clip, p=p, **options)
    for scale in (1.0, 100.0, 0.01):
        before = parameter.detach().clone()
        draw_gradients([parameter])
        parameter.grad *= scale
        optimizer.step()
        assert size(parameter.detach() - before) <= clip * (1 + 1e-10)


@given(st.floats(1e-3, 1e3))
def test_the_scale_of_gradients_does_not_matter(scale: float) -> None:
    start = torch.randn(4, 3, dtype=torch.float64)
    gradients = torch.randn(3, 4, 3, dtype=torch.float64)
    results = []
    for factor in (1.0, scale):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = FAdam([parameter], lr=0.1, eps=0.0, weight_decay=0.0)
        for gradient in gradients:
            parameter.grad = factor * gradient
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"eps": 0.0}, {"eps": 0.0, "p": 1.0}, {"eps2": 0.0}])
@pytest.mark.parametrize("capturable", [False, True])
def test_zero_gradients_give_no_nan(options: dict[str, Any], capturable: bool) -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    before = parameter.detach().clone()
    optimizer = FAdam([parameter], capturable=capturable, **options)
    for column in (0.0, 1.0, 0.0):
        parameter.grad = torch.tensor([0.0, column]).expand(3, 2)
        optimizer.step()
        assert parameter.isfinite().all()
        assert all(state.isfinite().all() for state in optimizer.state[parameter].values())
    if options.get("eps") == 0:
        assert torch.equal(parameter[:, 0], before[:, 0])


def test_zero_gradients_have_the_largest_epsilon() -> None:
    """Weights decay by it."""
    parameter = torch.nn.Parameter(torch.randn(4, dtype=torch.float64))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    FAdam([parameter], lr=0.1, weight_decay=0.5, eps=4.0, clip=1e6).step()
    torch.testing.assert_close(parameter.detach(), before * (1 - 0.1 * 0.5 / 4))


def test_the_information_is_stored() -> None:
    """It is the mean of all squares, if the mean keeps nearly all of itself."""
    parameter = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = FAdam([parameter], betas=(0.9, 1 - 1e-9))
    squares = []
    for _ in range(4):
        draw_gradients([parameter])
        assert parameter.grad is not None
        squares.append(parameter.grad**2)
        optimizer.step()
    mean = torch.stack(squares).mean(0)
    torch.testing.assert_close(optimizer.state[parameter]["fim"], mean, rtol=1e-6, atol=0)
