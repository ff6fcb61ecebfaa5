"""Adafactor: what is peculiar to it."""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.optim import Adafactor

import samples
from optim.samples import Optimized, Options, draw_gradients

OPTIONS: tuple[dict[str, Any], ...] = (
    {"lr": None, "relative_step": True},
    {"lr": None, "relative_step": True, "warmup_init": True, "beta1": 0.8, "weight_decay": 0.2},
    {"lr": 0.1, "eps": (1e-3, 2.0), "clip_threshold": 0.5, "decay_rate": -0.5},
    {"lr": 0.1, "scale_parameter": False, "weight_decay": 0.3, "clip_threshold": 5.0},
)


def size(x: Tensor) -> Tensor:
    return (sum((e * e for e in x.flatten()), x.new_zeros(())) / max(x.numel(), 1)).sqrt()


def inverse_root(G: Tensor, state: dict[str, Tensor], beta: float) -> Tensor:
    """What the gradient is multiplied by, element by element of each matrix."""
    if G.ndim < 2:
        state["exp_avg_sq"] = beta * state.get("exp_avg_sq", torch.zeros_like(G)) + (1 - beta) * G
        return 1 / state["exp_avg_sq"].sqrt()
    *leading, n, m = G.shape
    rows = state.get("exp_avg_sq_row", G.new_zeros(*leading, n)).reshape(-1, n)
    columns = state.get("exp_avg_sq_col", G.new_zeros(*leading, m)).reshape(-1, m)
    result = torch.empty(len(rows), n, m, dtype=G.dtype)
    for k, matrix in enumerate(G.reshape(-1, n, m)):
        for i in range(n):
            rows[k, i] = beta * rows[k, i] + (1 - beta) * matrix[i].sum() / m
        for j in range(m):
            columns[k, j] = beta * columns[k, j] + (1 - beta) * matrix[:, j].sum() / n
        for i in range(n):
            for j in range(m):
                v = rows[k, i] * columns[k, j] / (rows[k].sum() / n)
                result[k, i, j] = 1 / v.sqrt()
    state["exp_avg_sq_row"] = rows.reshape(*leading, n)
    state["exp_avg_sq_col"] = columns.reshape(*leading, m)
    return result.reshape(G.shape)


def definition(p: Tensor, g: Tensor, state: dict[str, Tensor], options: Options, t: int) -> Tensor:
    eps1, eps2 = options["eps"]
    if options["relative_step"]:
        rate = min(1e-6 * t if options["warmup_init"] else 1e-2, 1 / t**0.5)
    else:
        rate = float(options["lr"])
    alpha = rate * (max(float(size(p)), eps2) if options["scale_parameter"] else 1.0)
    u = g * inverse_root(g**2 + eps1, state, 1 - t ** options["decay_rate"])
    u = alpha * u / max(1.0, float(size(u)) / options["clip_threshold"])
    if options["beta1"] is not None:
        m, beta1 = state.get("exp_avg", torch.zeros_like(p)), options["beta1"]
        u = state["exp_avg"] = beta1 * m + (1 - beta1) * u
    return p - options["weight_decay"] * alpha * p - u


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            Adafactor,
            definition,
            options=OPTIONS,
            accepts={"lr": 0.05, "relative_step": False},
            standard_decay=False,
            elementwise=False,
            refuses=(
                ("lr must be None with relative_step=True", ValueError, {"relative_step": True}),
                ("lr must be given with relative_step=False", ValueError, {"lr": None}),
                ("warmup_init must be False", ValueError, {"warmup_init": True}),
                ("decay_rate must be a number of at most 0", ValueError, {"decay_rate": 0.1}),
                ("decay_rate must be a finite", ValueError, {"decay_rate": float("nan")}),
                (
                    "clip_threshold must be a finite number above 0",
                    ValueError,
                    {"clip_threshold": 0},
                ),
                (r"eps\[1\] must be a finite number", ValueError, {"eps": (1e-30, -1.0)}),
                (r"eps\[0\] must be a finite number", ValueError, {"eps": (-1e-30, 1.0)}),
                ("eps must be two numbers", ValueError, {"eps": 1e-30}),
                ("beta1 must be a number", ValueError, {"beta1": 1.0}),
                ("scale_parameter must be True or False", TypeError, {"scale_parameter": 1}),
            ),
        )
    ]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 4, 3)])
def test_is_that_of_transformers(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    start = torch.randn(shape, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    known = {"relative_step": False} | options
    optimizers = Adafactor([ours], **known), transformers.Adafactor([theirs], **known)
    for _ in range(4):
        draw_gradients([ours])
        theirs.grad = ours.grad
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("warmup_init", [False, True])
def test_late_steps_shrink_as_those_of_transformers(warmup_init: bool) -> None:
    start = torch.randn(5, 3, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = Adafactor([ours], warmup_init=warmup_init)
    other = transformers.Adafactor([theirs], warmup_init=warmup_init)
    for _ in range(3):
        draw_gradients([ours])
        theirs.grad = ours.grad
        optimizer.step()
        other.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
        optimizer.state[ours]["step"].fill_(40_000)
        other.state[theirs]["step"] = 40_000


def test_squares_of_rank_one_need_no_more_than_rows_and_columns() -> None:
    start = torch.randn(4, 3, dtype=torch.float64)
    factored, flat = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.reshape(-1))
    optimizers = [Adafactor([p], eps=(0.0, 1e-3)) for p in (factored, flat)]
    gradient = torch.randn(4, 1, dtype=torch.float64) * torch.randn(1, 3, dtype=torch.float64)
    for scale in (1.0, -3.0, 0.2):
        factored.grad = scale * gradient
        flat.grad = factored.grad.reshape(-1)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(factored.reshape(-1), flat, rtol=1e-13, atol=0)


@given(st.floats(0.1, 3), st.floats(-2, -0.1))
def test_no_step_is_longer_than_the_threshold(clip_threshold: float, decay_rate: float) -> None:
    parameter = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    options = {"clip_threshold": clip_threshold, "decay_rate": decay_rate}
    optimizer = Adafactor([parameter], lr=0.1, relative_step=False, **options)
    for scale in (1.0, 100.0, 0.01):
        before = parameter.detach().clone()
        draw_gradients([parameter])
        parameter.grad *= scale
        optimizer.step()
        longest = 0.1 * clip_threshold * size(before)
        assert size(parameter.detach() - before) <= longest * (1 + 1e-12)


@given(st.floats(1e-3, 1e3))
def test_the_scale_of_gradients_does_not_matter(scale: float) -> None:
    shapes = (4, 3), (5,)
    start = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(3)]
    results = []
    for factor in (1.0, scale):
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = Adafactor(parameters, weight_decay=0.1, beta1=0.9)
        for gradient in gradients:
            for p, g in zip(parameters, gradient, strict=True):
                p.grad = factor * g
            optimizer.step()
        results.append(torch.cat([p.detach().reshape(-1) for p in parameters]))
    torch.testing.assert_close(*results, rtol=1e-13, atol=0)


def test_a_matrix_has_a_number_for_each_row_and_column() -> None:
    parameter = torch.nn.Parameter(torch.randn(100, 30))
    draw_gradients([parameter])
    optimizer = Adafactor([parameter])
    optimizer.step()
    state = optimizer.state[parameter]
    assert sum(value.numel() for name, value in state.items() if name != "step") == 130


def test_nothing_moves_without_gradients_and_decay() -> None:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,), ())]
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    Adafactor(parameters).step()
    for p, old in zip(parameters, before, strict=True):
        assert torch.equal(p, old)


def test_matrices_without_elements() -> None:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((0, 3), (3, 0), (2, 0, 3))]
    draw_gradients(parameters)
    optimizer = Adafactor(parameters)
    optimizer.step()
    assert all(s.isfinite().all() for state in optimizer.state.values() for s in state.values())
