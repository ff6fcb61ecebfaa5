"""Lion: what is peculiar to it."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.optim import Lion

import samples
from optim.samples import Optimized, Options, draw_gradients


def definition(p: Tensor, g: Tensor, state: dict[str, Tensor], options: Options, t: int) -> Tensor:
    beta1, beta2 = options["betas"]
    m = state.get("exp_avg", torch.zeros_like(p))
    state["exp_avg"] = beta2 * m + (1 - beta2) * g
    return p - float(options["lr"]) * torch.sign(beta1 * m + (1 - beta1) * g)


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            Lion,
            definition,
            options=(
                {},
                {"lr": 0.1, "betas": (0.5, 0.8), "weight_decay": 0.3},
                {"lr": 0.02, "weight_decay": 0.1, "decouple_lr": True, "reference_lr": 0.1},
            ),
            is_complex=True,
        )
    ]


def test_every_coordinate_moves_by_the_rate() -> None:
    parameter = torch.nn.Parameter(torch.randn(5, 7, dtype=torch.float64))
    optimizer = Lion([parameter], lr=0.25)
    for _ in range(3):
        before = parameter.detach().clone()
        draw_gradients([parameter])
        optimizer.step()
        change = (parameter.detach() - before).abs()
        torch.testing.assert_close(change, torch.full_like(change, 0.25), rtol=1e-14, atol=0)


def test_nothing_moves_where_all_is_zero() -> None:
    parameter = torch.nn.Parameter(torch.randn(5))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros(5)
    Lion([parameter], lr=0.25).step()
    assert torch.equal(parameter, before)


@given(st.floats(1e-3, 1e3))
def test_the_scale_of_gradients_does_not_matter(scale: float) -> None:
    start = torch.randn(6, dtype=torch.float64)
    gradients = torch.randn(3, 6, dtype=torch.float64)
    results = []
    for factor in (1.0, scale):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = Lion([parameter], lr=0.1, weight_decay=0.1)
        for gradient in gradients:
            parameter.grad = factor * gradient
            optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


def test_equal_betas_take_the_sign_of_the_new_mean() -> None:
    parameter = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = Lion([parameter], lr=1.0, betas=(0.7, 0.7))
    expected = torch.zeros(50, dtype=torch.float64)
    for _ in range(4):
        draw_gradients([parameter])
        optimizer.step()
        expected -= optimizer.state[parameter]["exp_avg"].sign()
        assert torch.equal(parameter, expected)
