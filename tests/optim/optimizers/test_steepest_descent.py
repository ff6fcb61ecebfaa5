"""SteepestDescent: what is peculiar to it."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tilework.optim import SteepestDescent, step_in_backward

import samples
from optim.samples import Optimized, Options, draw_gradients

CUBIC = (1.5, -0.5, 0.0)


def polar(matrix: np.ndarray, options: Options) -> np.ndarray:
    """The polar factor of a matrix, or what the iteration makes of it."""
    if not matrix.size or not matrix.any():
        return np.zeros_like(matrix)
    if options["method"] == "svd":
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        return (u * (s > max(matrix.shape) * np.finfo(matrix.dtype).eps * s.max())) @ vh
    a, b, c = np.asarray(options["coefficients"], matrix.dtype)
    x = matrix / max(np.linalg.norm(matrix), options["eps"])
    for _ in range(options["steps"]):
        q = x.T @ x
        x = a * x + x @ (b * q + c * q @ q)
    return x


def direction(u: Tensor, options: Options) -> tuple[Tensor, Any]:
    matrix = u.numpy().reshape(u.shape[0] if u.ndim else 1, -1) if u.numel() else np.zeros((1, 1))
    matrix = matrix.astype(str(u.dtype).removeprefix("torch."))
    rows, columns = matrix.shape
    if options["norm"] == "linf":
        best, dual = np.sign(matrix), np.abs(matrix).sum()
    elif options["norm"] == "l2":
        dual = np.linalg.norm(matrix)
        best = matrix / dual if dual else matrix
    elif options["norm"] == "embedding":
        sizes = np.sqrt((matrix**2).mean(axis=1, keepdims=True))
        best = matrix / np.where(sizes > 0, sizes, 1)
        dual = np.asarray(columns, matrix.dtype) * sizes.sum()
    else:
        best = polar(matrix, options)
        scale = np.asarray(rows / columns, matrix.dtype) ** 0.5
        best = scale * best if options["norm"] == "rms" else best
        dual = (matrix * best).sum()
    shaped = best.reshape(u.shape) if u.numel() else np.zeros(u.shape)
    return torch.from_numpy(np.asarray(shaped)).to(u.dtype), torch.tensor(dual, dtype=u.dtype)


def directed(g: Tensor, state: dict[str, Tensor], options: Options) -> tuple[Tensor, Any]:
    u, momentum = g, options["momentum"]
    if momentum > 0:
        b = momentum * state.get("momentum_buffer", torch.zeros_like(g)) + (1 - momentum) * g
        state["momentum_buffer"] = b
        u = momentum * b + (1 - momentum) * g if options["nesterov"] else b
    return direction(u, options)


def definition(p: Tensor, g: Tensor, state: dict[str, Tensor], options: Options, t: int) -> Tensor:
    best, dual = directed(g, state, options)
    h = 1 / options["sensitivity"]
    if options["scale"] == "dual":
        h = dual / options["sensitivity"] ** 2
    return p - float(options["lr"]) * h * best


def together(
    ps: list[Tensor],
    gs: list[Tensor],
    states: list[dict[str, Tensor]],
    options: Options,
    steps: list[int],
) -> list[Tensor]:
    bests, duals = zip(
        *(directed(g, state, options) for g, state in zip(gs, states, strict=True)), strict=True
    )
    h = sum(dual / options["sensitivity"] for dual in duals) / options["sensitivity"]
    return [p - float(options["lr"]) * h * best for p, best in zip(ps, bests, strict=True)]


MATRICES = ((2, 7), (6, 2), (0, 3), (3, 4, 3))


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    momentum = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    return [
        Optimized(
            SteepestDescent,
            definition,
            options=(
                {},
                momentum | {"norm": "rms", "coefficients": CUBIC, "steps": 3, "eps": 1e-3},
                {"norm": "embedding", "lr": 0.1, "momentum": 0.5, "sensitivity": 2.0},
                {"norm": "rms", "method": "svd", "scale": "dual", "sensitivity": 3.0},
            ),
            shapes=MATRICES,
            elementwise=False,
            refuses=(
                ("norm must be one of 'linf', 'l2'", ValueError, {"norm": "l3"}),
                ("method must be one of 'svd'", ValueError, {"method": "qr"}),
                ("scale must be one of 'unit', 'dual'", ValueError, {"scale": "one"}),
                ("sensitivity must be a finite number above", ValueError, {"sensitivity": 0.0}),
                ("steps must be an int of at least 0", ValueError, {"steps": -1}),
                ("coefficients must be three numbers", ValueError, {"coefficients": (1.0, 2.0)}),
                (
                    r"coefficients\[1\] must be a finite number",
                    ValueError,
                    {"coefficients": (1.0, torch.inf, 2.0)},
                ),
                ("nesterov must be False without a momentum", ValueError, {"nesterov": True}),
                *(
                    (
                        f"params must be of at least 2 dimensions with norm='{norm}'",
                        ValueError,
                        {"norm": norm, "params": [torch.zeros(3)]},
                    )
                    for norm in ("spectral", "rms", "embedding")
                ),
            ),
        ),
        Optimized(
            SteepestDescent,
            definition,
            accepts={"norm": "linf"},
            options=(
                {"scale": "dual", "sensitivity": 2.0},
                momentum | {"norm": "l2", "decouple_lr": True},
            ),
            elementwise=False,
        ),
        Optimized(
            SteepestDescent,
            together,
            accepts={"scale": "modular"},
            options=(
                {"sensitivity": 2.0, "steps": 2},
                momentum | {"norm": "embedding"},
            ),
            shapes=MATRICES[:3],
            elementwise=False,
            together=True,
        ),
    ]


def run(options: dict[str, Any], shapes: list[tuple[int, ...]], count: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    optimizer = SteepestDescent(parameters, lr=0.1, **options)
    for _ in range(count):
        draw_gradients(parameters)
        optimizer.step()
    return [p.detach() for p in parameters]


def test_linf_is_sign_descent_and_l2_normalized_descent() -> None:
    for norm, of in (("linf", torch.sign), ("l2", lambda g: g / g.norm())):
        parameter = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
        optimizer = SteepestDescent([parameter], lr=0.1, norm=norm)
        for _ in range(2):
            draw_gradients([parameter])
            expected = parameter.detach() - 0.1 * of(parameter.grad)
            optimizer.step()
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("norm", ["linf", "l2", "spectral", "rms", "embedding"])
@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
def test_with_one_tensor_modular_is_dual(norm: str, method: str) -> None:
    options = {"norm": norm, "method": method, "sensitivity": 3.0, "momentum": 0.5}
    dual, modular = (run(options | {"scale": scale}, [(4, 3)]) for scale in ("dual", "modular"))
    torch.testing.assert_close(dual, modular, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("norm", ["linf", "spectral", "embedding"])
def test_the_dual_scale_solves_its_problem(norm: str) -> None:
    """No other point on the way or beside it has a smaller value."""
    sizes = {
        "linf": lambda d: d.abs().max(),
        "spectral": lambda d: torch.linalg.matrix_norm(d, 2),
        "embedding": lambda d: d.square().mean(1).sqrt().max(),
    }
    parameter = torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    optimizer = SteepestDescent(
        [parameter], lr=0.1, norm=norm, method="svd", scale="dual", sensitivity=2.0
    )
    draw_gradients([parameter])
    optimizer.step()
    g = parameter.grad

    def value(change: Tensor) -> float:
        assert g is not None
        return float((g * change).sum() + 4 * sizes[norm](change) ** 2 / (2 * 0.1))

    best = parameter.detach()
    for scale in (0.0, 0.9, 1.1):
        assert value(best) < value(scale * best)
    for _ in range(20):
        assert value(best) < value(best + 1e-3 * torch.randn(4, 3, dtype=torch.float64))


def test_modular_sums_over_groups_with_their_sensitivities() -> None:
    """Whatever the scale of the other groups is."""
    torch.manual_seed(1)
    parameters = [torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64)) for _ in range(3)]
    optimizer = SteepestDescent(
        [
            {"params": parameters[:1], "scale": "modular", "sensitivity": 2.0, "norm": "l2"},
            {"params": parameters[1:2], "scale": "modular", "norm": "linf"},
            {"params": parameters[2:], "sensitivity": 4.0, "norm": "l2"},
        ],
        lr=0.1,
    )
    draw_gradients(parameters)
    optimizer.step()
    g = [p.grad for p in parameters]
    total = g[0].norm() / 2 + g[1].abs().sum() + g[2].norm() / 4  # type: ignore[union-attr]
    expected = [
        -0.1 * total / 2 * g[0] / g[0].norm(),  # type: ignore[union-attr,operator]
        -0.1 * total * g[1].sign(),  # type: ignore[union-attr]
        -0.1 / 4 * g[2] / g[2].norm(),  # type: ignore[union-attr,operator]
    ]
    for p, new in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.detach(), new, rtol=1e-13, atol=0)


def test_only_modular_groups_make_it_global() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    optimizer = SteepestDescent(parameters[:1], scale="dual")
    step_in_backward(optimizer).remove()
    optimizer.add_param_group({"params": parameters[1:], "scale": "modular"})
    with pytest.raises(ValueError, match="must update each parameter by its own gradient"):
        step_in_backward(optimizer)


def test_a_rotated_problem_takes_rotated_steps() -> None:
    torch.manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (4, 3))
    runs = []
    for rotated, method in itertools.product((False, True), ("svd", "newton_schulz")):
        torch.manual_seed(3)
        start, *gradients = torch.randn(4, 4, 3, dtype=torch.float64)
        parameter = torch.nn.Parameter(left @ start @ right if rotated else start)
        optimizer = SteepestDescent([parameter], lr=0.1, momentum=0.5, method=method)
        for g in gradients:
            parameter.grad = left @ g @ right if rotated else g
            optimizer.step()
        result = parameter.detach()
        runs.append(left.mT @ result @ right.mT if rotated else result)
    torch.testing.assert_close(runs[:2], runs[2:], rtol=1e-11, atol=1e-12)
