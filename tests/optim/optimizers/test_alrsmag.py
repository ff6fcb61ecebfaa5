"""ALRSMAG: what is peculiar to it, and to all whose step takes a loss."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tilework.optim import ALRSHB, ALRSMAG

import samples
from helpers import assert_exact
from optim.samples import LOSS, Optimized, Options, draw_gradients

both = pytest.mark.parametrize("kind", [ALRSMAG, ALRSHB])


def definition(
    ps: list[Tensor],
    gs: list[Tensor],
    states: list[dict[str, Tensor]],
    options: Options,
    steps: list[int],
) -> list[Tensor]:
    norm_sq = torch.zeros((), dtype=ps[0].dtype)
    for g, state in zip(gs, states, strict=True):
        b = options["momentum"] * state.get("momentum_buffer", torch.zeros_like(g)) + g
        state["momentum_buffer"] = b
        norm_sq = norm_sq + sum(x * x for x in b.flatten())
    lr = float(options["lr"])
    size = max(0, (LOSS - options["lower_bound"]) / (options["c"] * norm_sq))
    eta = min(lr, size)
    return [
        p * (1 - options["weight_decay"] * eta) - eta * state["momentum_buffer"]
        for p, state in zip(ps, states, strict=True)
    ]


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            ALRSMAG,
            definition,
            options=(
                {},
                {"lr": 1e-3, "weight_decay": 0.3},
                {"lr": float("inf"), "c": 0.5, "lower_bound": 0.2, "weight_decay": 0.1},
                {"momentum": 0.0, "lower_bound": 0.9},
            ),
            standard_decay=False,
            together=True,
            takes_loss=True,
            refuses=(
                ("c must be a finite number above 0", ValueError, {"c": 0.0}),
                ("lower_bound must be a finite number", ValueError, {"lower_bound": torch.inf}),
            ),
        )
    ]


@both
def test_a_parabola_is_halved(kind: Any) -> None:
    parameter = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = kind([parameter], lr=torch.inf, momentum=0.0)
    for _ in range(3):
        before = parameter.detach().clone()
        loss = 3.0 / 2 * parameter.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        torch.testing.assert_close(parameter.detach(), before / 2, rtol=1e-14, atol=0)
        assert float(optimizer.last_step_size[0]) == pytest.approx(1 / 6, rel=1e-14)


@pytest.mark.parametrize("lr", [1e-3, 10.0])
def test_both_agree_without_momentum(lr: float) -> None:
    start = [torch.randn(5, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)]
    runs = []
    for kind in (ALRSMAG, ALRSHB):
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = kind(parameters, lr=lr, momentum=0.0, weight_decay=0.1)
        for t in range(3):
            for p in parameters:
                p.grad = p.detach() + t
            optimizer.step(loss=1.0)
        runs.append(parameters)
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


def test_without_momentum_it_is_the_capped_polyak_step() -> None:
    for lr in (0.01, 10.0):
        parameter = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
        optimizer = ALRSMAG([parameter], lr=lr, momentum=0.0, lower_bound=0.5)
        draw_gradients([parameter])
        before, g = parameter.detach().clone(), parameter.grad
        assert g is not None
        optimizer.step(loss=2.0)
        eta = min(lr, 1.5 / float(g.square().sum()))
        torch.testing.assert_close(parameter.detach(), before - eta * g, rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss", [0.5, 0.4])
def test_nothing_moves_at_or_below_the_bound(loss: float) -> None:
    parameter = torch.nn.Parameter(torch.randn(5))
    before = parameter.detach().clone()
    optimizer = ALRSMAG([parameter], lower_bound=0.5)
    draw_gradients([parameter])
    optimizer.step(loss=loss)
    assert torch.equal(parameter, before)
    assert optimizer.last_step_size == [0.0]


@both
@pytest.mark.parametrize("loss", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("lr", [0.25, torch.inf])
def test_without_gradients_the_step_is_the_largest(kind: Any, lr: float, loss: float) -> None:
    """An infinite step moves nothing there."""
    parameter = torch.nn.Parameter(torch.ones(5))
    optimizer = kind([parameter], lr=lr, weight_decay=0.1)
    parameter.grad = torch.zeros(5)
    optimizer.step(loss=loss)
    expected = 1 - 0.1 * lr if lr < torch.inf else 1.0
    torch.testing.assert_close(parameter.detach(), torch.full((5,), expected))
    assert optimizer.last_step_size == [lr]


@both
def test_all_groups_have_one_sum_and_their_own_cap(kind: Any) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(3)]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.01}]
    optimizer = kind(groups, lr=1.0)
    for p, g in zip(parameters, (3.0, 4.0, 12.0), strict=True):
        p.grad = torch.full((1,), g, dtype=torch.float64)
    optimizer.step(loss=16.9)
    sizes = [float(size) for size in optimizer.last_step_size]
    assert sizes == pytest.approx([0.1, 0.01], rel=1e-14)
    moved = torch.cat([p.detach() for p in parameters])
    torch.testing.assert_close(moved, -torch.tensor([0.3, 0.4, 0.12], dtype=torch.float64))
    sizes = optimizer.last_step_size
    parameters[2].grad = None
    optimizer.step(loss=1e9)
    assert [float(size) for size in sizes] == pytest.approx([0.1, 0.01], rel=1e-14)
    assert [float(size) for size in optimizer.last_step_size] == [1.0, 0.01]


@both
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))]
)
def test_copies_know_the_last_step(kind: Any, copied: Callable[[Any], Any]) -> None:
    parameter = torch.nn.Parameter(torch.ones(5))
    optimizer = kind([parameter])
    assert optimizer.last_step_size == [0.0]
    draw_gradients([parameter])
    optimizer.step(loss=0.1)
    assert copied(optimizer).last_step_size == optimizer.last_step_size


@both
def test_a_number_is_not_rounded_to_float32(kind: Any) -> None:
    loss = 1 / 3
    for given in (loss, np.float64(loss), torch.tensor(loss, dtype=torch.float64)):
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        parameter.grad = torch.ones_like(parameter)
        kind([parameter], lr=1.0).step(loss=given)
        truth = torch.full((1,), -loss, dtype=torch.float64)
        assert_exact(parameter.detach(), truth.float(), truth)


@both
def test_a_loss_of_half_precision_counts_as_it_is(kind: Any) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones_like(parameter)
    optimizer = kind([parameter], lr=1.0, lower_bound=1e-4)
    optimizer.step(loss=torch.tensor(1.0, dtype=torch.bfloat16))
    truth = torch.full((1,), 1e-4 - 1, dtype=torch.float64)
    assert_exact(parameter.detach(), truth.float(), truth)


@both
def test_nan_shows(kind: Any) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = kind([parameter], lr=torch.inf)
    parameter.grad = torch.ones(3)
    optimizer.step(loss=torch.nan)
    assert parameter.isnan().all()


@both
def test_returns_what_the_closure_does(kind: Any) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([parameter])
    parameter.grad = torch.ones(3)
    assert optimizer.step(loss=1.0) is None
    assert optimizer.step(lambda: 2.5) == 2.5


@pytest.mark.untyped
@both
def test_refuses_what_is_no_loss(kind: Any) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([parameter])
    name = kind.__name__
    with pytest.raises(ValueError, match=f"^{name}: either closure or loss must be given"):
        optimizer.step()
    with pytest.raises(ValueError, match=f"^{name}: either closure or loss must be given"):
        optimizer.step(lambda: 1.0, loss=1.0)
    for bad in (torch.ones(1), torch.ones((), dtype=torch.complex64)):
        with pytest.raises(ValueError, match=f"^{name}: loss must be a real number"):
            optimizer.step(loss=bad)
        with pytest.raises(ValueError, match=f"^{name}: loss must be a real number"):
            optimizer.step(lambda bad=bad: bad)
    with pytest.raises(TypeError, match=f"^{name}: loss must be a number, got '1'"):
        optimizer.step(loss="1")
    with pytest.raises(TypeError, match=f"^{name}: loss must be a number, got None"):
        optimizer.step(lambda: None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'maximize'"):
        kind([parameter], maximize=True)
    with pytest.raises(ValueError, match="a group must have no keys but"):
        kind([{"params": [parameter], "maximize": True}])
