"""AdamW: what is peculiar to it."""

import copy

import pytest
import torch
from torch import Tensor

from tilework.optim import AdamW

import samples
from helpers import assert_exact
from optim.samples import Optimized, Options, draw_gradients


def definition(p: Tensor, g: Tensor, state: dict[str, Tensor], options: Options, t: int) -> Tensor:
    beta1, beta2 = options["betas"]
    zeros = torch.zeros_like(p)
    m = state["exp_avg"] = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * g**2
    if options["amsgrad"]:
        v = state["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", zeros), v)
    unbiased = m / (1 - beta1**t)
    return p - float(options["lr"]) * unbiased / ((v / (1 - beta2**t)).sqrt() + options["eps"])


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            AdamW,
            definition,
            options=(
                {},
                {"lr": 0.1, "betas": (0.5, 0.8), "eps": 1e-2, "weight_decay": 0.3},
                {"amsgrad": True, "weight_decay": 0.0},
                {"lr": 0.02, "weight_decay": 0.1, "decouple_lr": True, "reference_lr": 0.1},
            ),
            is_complex=True,
            refuses=(
                ("amsgrad must be True or False", TypeError, {"amsgrad": 1}),
                (
                    "reference_lr must be above 0",
                    ValueError,
                    {"lr": 0.0, "decouple_lr": True},
                ),
            ),
        )
    ]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("foreach", [None, False])
def test_checkpoints_of_torch_and_back(amsgrad: bool, foreach: bool | None) -> None:
    """A run that changes hands twice ends where torch's ends."""
    start = [torch.randn(5, 3), torch.randn(7)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(6)]
    runs = []
    for classes in ([torch.optim.AdamW] * 3, [torch.optim.AdamW, AdamW, torch.optim.AdamW]):
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        saved = None
        for index, kind in enumerate(classes):
            optimizer = kind(parameters, lr=0.1, amsgrad=amsgrad, foreach=foreach)
            if saved is not None:
                optimizer.load_state_dict(copy.deepcopy(saved))
            for gradient in gradients[2 * index : 2 * index + 2]:
                for p, g in zip(parameters, gradient, strict=True):
                    p.grad = g.clone()
                optimizer.step()
            saved = optimizer.state_dict()
        runs.append(parameters)
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_decay_of_nothing_else() -> None:
    parameter = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    start = parameter.detach().clone()
    optimizer = AdamW([parameter], lr=0.1, weight_decay=0.2)
    for _ in range(3):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), start * (1 - 0.02) ** 3, rtol=1e-14, atol=0)
    state = optimizer.state[parameter]
    assert not state["exp_avg"].any()
    assert not state["exp_avg_sq"].any()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_decoupled_decay_is_that_of_the_schedule(weight_decay: float) -> None:
    """Half of the rate halves what the gradient does, and leaves the decay."""
    parameters = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    for parameter, lr in zip(parameters, (0.1, 0.05), strict=True):
        optimizer = AdamW([parameter], lr=lr, weight_decay=weight_decay, decouple_lr=True)
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        torch.testing.assert_close(
            parameter.detach(), torch.full_like(parameter, 1 - weight_decay), rtol=1e-14, atol=0
        )
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        optimizer.step()
        expected = (1 - weight_decay) * (1 - weight_decay / 2)
        torch.testing.assert_close(
            parameter.detach(), torch.full_like(parameter, expected), rtol=1e-14, atol=0
        )


@pytest.mark.untyped
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_compiled_is_the_same_to_rounding(rounding: str) -> None:
    """By the compiler that users have; those of all optimizers trace alone."""
    start = [torch.randn(301).bfloat16(), torch.randn(20000)]
    runs = []
    for compiled in (False, True):
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = AdamW(parameters, lr=0.1, rounding=rounding, compiled=compiled)
        torch.manual_seed(1)
        for _ in range(3):
            draw_gradients(parameters)
            optimizer.step()
        runs.append(parameters)
    for eager, compiled_ in zip(*runs, strict=True):
        roundings = 3 * 3 * torch.finfo(eager.dtype).eps  # three in each of three steps
        torch.testing.assert_close(eager, compiled_, rtol=roundings, atol=roundings)


def test_small_gradients_do_not_underflow_in_the_correction() -> None:
    """In the first step 1 - beta2 ** t is 1e-3, of which float32 would lose five digits."""
    p = torch.nn.Parameter(torch.zeros(100, dtype=torch.float64))
    optimizer = AdamW([p], lr=1.0, weight_decay=0.0, capturable=True)
    draw_gradients([p])
    g = p.grad
    optimizer.step()
    assert g is not None
    truth = -g / (g.abs() + 1e-8)
    assert_exact(p.detach(), truth.float(), truth)
