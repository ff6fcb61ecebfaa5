"""AdamP: what is peculiar to it, and the projection that it shares with SGDP."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.optim import SGDP, SGDW, AdamP, AdamW

import samples
from optim.samples import Optimized, Options, draw_gradients


def projected(p: Tensor, g: Tensor, u: Tensor, options: Options) -> tuple[Tensor, float]:
    """Row by row of either view, as the released code's names have it."""
    if p.ndim < 2:
        return u, 1.0
    eps = options["eps"]
    for view in ((p.shape[0], -1), (1, -1)):
        rows = list(zip(p.reshape(view), g.reshape(view), u.reshape(view), strict=True))
        largest = max(
            abs(float(gr @ pr)) / (max(float(gr.norm()), eps) * max(float(pr.norm()), eps))
            for pr, gr, _ in rows
        )
        if largest < options["delta"] / len(rows[0][0]) ** 0.5:
            units = [pr / (pr.norm() + eps) for pr, *_ in rows]
            new = [ur - e * (e @ ur) for e, (*_, ur) in zip(units, rows, strict=True)]
            return torch.stack(new).reshape(p.shape), options["wd_ratio"]
    return u, 1.0


def definition(p: Tensor, g: Tensor, state: dict[str, Tensor], options: Options, t: int) -> Tensor:
    beta1, beta2 = options["betas"]
    lr, zeros = float(options["lr"]), torch.zeros_like(p)
    m = state["exp_avg"] = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * g**2
    D = v.sqrt() / (1 - beta2**t) ** 0.5 + options["eps"]
    u = (beta1 * m + (1 - beta1) * g) / D if options["nesterov"] else m / D
    u, factor = projected(p, g, u, options)
    return p * (1 - lr * options["weight_decay"] * factor) - lr / (1 - beta1**t) * u


@samples.of(Optimized)
def optimizers() -> list[Optimized]:
    return [
        Optimized(
            AdamP,
            definition,
            options=(
                {},
                {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1, "weight_decay": 0.3, "delta": 2.0},
                {"lr": 0.1, "weight_decay": 0.5, "delta": 0.7, "wd_ratio": 0.3, "nesterov": True},
            ),
            standard_decay=False,
            elementwise=False,
            refuses=(
                ("delta must be a finite number of at least 0", ValueError, {"delta": -0.1}),
                ("wd_ratio must be a finite number of at least 0", ValueError, {"wd_ratio": -1}),
                ("nesterov must be True or False", TypeError, {"nesterov": 1}),
            ),
        )
    ]


EITHER = pytest.mark.parametrize("kind", [AdamP, SGDP])


def orthogonal(p: Tensor, row_by_row: bool) -> Tensor:
    """A random gradient at right angles to each row, or to the whole tensor alone."""
    g = torch.randn_like(p)
    rows = (lambda t: t) if row_by_row else (lambda t: t.reshape(1, -1))
    units = torch.nn.functional.normalize(rows(p))
    return (rows(g) - (rows(g) * units).sum(-1, keepdim=True) * units).reshape(p.shape)


@EITHER
@pytest.mark.parametrize("row_by_row", [True, False])
def test_which_view_is_projected(kind: Any, row_by_row: bool) -> None:
    """The rows', or, where only the whole gradient is orthogonal, the whole tensor's."""
    parameter = torch.nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    before = parameter.detach().clone()
    optimizer = kind([parameter], lr=0.1, weight_decay=0.0, eps=1e-14)
    draw_gradients([parameter])
    optimizer.step()  # so that the momentum is not orthogonal
    before = parameter.detach().clone()
    parameter.grad = orthogonal(before, row_by_row)
    optimizer.step()
    along = ((parameter.detach() - before) * before).sum(-1)
    assert float(along.sum()) == pytest.approx(0, abs=1e-12)
    assert (along.abs().amax() < 1e-12) == row_by_row


@EITHER
@pytest.mark.parametrize("row_by_row", [True, False, None])
def test_what_is_projected_decays_less(kind: Any, row_by_row: bool | None) -> None:
    changes = []
    for weight_decay in (0.0, 0.1):
        torch.manual_seed(1)
        parameter = torch.nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
        before = parameter.detach().clone()
        optimizer = kind([parameter], lr=1.0, weight_decay=weight_decay, wd_ratio=0.25)
        parameter.grad = before.clone() if row_by_row is None else orthogonal(before, row_by_row)
        optimizer.step()
        changes.append(parameter.detach() - before)
    factor = 1 if row_by_row is None else 0.25
    torch.testing.assert_close(changes[1] - changes[0], -0.1 * factor * before)


@EITHER
def test_no_gradient_is_at_right_angles(kind: Any) -> None:
    parameter = torch.nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    kind([parameter], lr=1.0, weight_decay=0.1, wd_ratio=0.25).step()
    torch.testing.assert_close(parameter.detach(), before * (1 - 0.1 * 0.25))


@given(st.integers(0, 2**16))
def test_no_delta_is_adamw_and_sgdw(seed: int) -> None:
    torch.manual_seed(seed)
    start = torch.randn(4, 3, dtype=torch.float64)
    pairs = (
        (AdamP, {}, AdamW, {"weight_decay": 0.2}),
        (SGDP, {"momentum": 0.75}, SGDW, {"momentum": 0.75, "weight_decay": 0.8}),
    )
    for kind, options, other, others in pairs:
        ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
        optimizers = (
            kind([ours], lr=0.1, weight_decay=0.2, delta=0.0, **options),
            other([theirs], lr=0.1, **others),
        )
        for _ in range(3):
            ours.grad = orthogonal(ours.detach(), True)
            theirs.grad = ours.grad
            for optimizer in optimizers:
                optimizer.step()
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@EITHER
@pytest.mark.parametrize("shape", [(6,), ()])
def test_vectors_are_never_projected(kind: Any, shape: tuple[int, ...]) -> None:
    """Whatever the threshold."""
    start = torch.randn(shape, dtype=torch.float64)
    results = []
    for delta in (0.0, 1e6):
        parameter = torch.nn.Parameter(start.clone())
        parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(3)).double()
        kind([parameter], lr=0.1, weight_decay=0.1, delta=delta).step()
        results.append(parameter.detach())
    assert torch.equal(*results)


@EITHER
@pytest.mark.parametrize("nesterov", [False, True])
def test_scale_invariant_weights_grow_by_their_steps_alone(kind: Any, nesterov: bool) -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 4, 2, dtype=torch.float64))
    factor = torch.randn(3, 4, 2, dtype=torch.float64)
    options = {"momentum": 0.9} if kind is SGDP else {}
    optimizer = kind([parameter], lr=0.1, nesterov=nesterov, eps=1e-14, **options)
    for _ in range(5):
        before = parameter.detach().clone()
        (factor * torch.nn.functional.normalize(parameter, dim=(1, 2))).sum().backward()  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()
        change = parameter.detach() - before
        torch.testing.assert_close(
            parameter.detach().square().sum(),
            before.square().sum() + change.square().sum(),
            rtol=1e-12,
            atol=0,
        )


@EITHER
def test_zero_gradients_and_weights_stay_finite(kind: Any) -> None:
    for eps in (0.0, 1e-8):
        parameters = [torch.nn.Parameter(p) for p in (torch.zeros(3, 2), torch.randn(3, 2))]
        optimizer = kind(parameters, lr=0.1, eps=eps)
        draw_gradients(parameters)
        optimizer.step()
        for p in parameters:
            p.grad = torch.zeros(3, 2)
        optimizer.step()
        assert all(p.isfinite().all() for p in parameters)
