"""LAWN: an optimizer that keeps the norms of weights after some steps."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.optim import LAWN, AdamW, Lion, step_in_backward

from helpers import assert_exact
from optim.samples import draw_gradients

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
BASES: dict[str, Make] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.1),
    "lion": lambda ps: Lion(ps, lr=0.1),
    "adamw": lambda ps: AdamW(ps, lr=0.1, weight_decay=0.0, foreach=False),
}
bases = pytest.mark.parametrize("make", BASES.values(), ids=BASES.keys())


def drawn(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    shapes = (3, 5), (7,), (2, 3, 4), (2, 2)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes
    ]
    parameters[-1].data.zero_()
    return parameters


def copied(parameters: list[torch.nn.Parameter], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().to(dtype, copy=True)) for p in parameters]


def give(parameters: list[torch.nn.Parameter], others: list[torch.nn.Parameter]) -> None:
    draw_gradients(parameters)
    for p, other in zip(parameters, others, strict=True):
        other.grad = p.grad.to(other.dtype, copy=True)  # type: ignore[union-attr]


@bases
@pytest.mark.parametrize("project_update", [True, False])
def test_equals_the_definition(make: Make, project_update: bool) -> None:
    """Written as loops around a second optimizer of the same kind."""
    start, free_steps = drawn(), 2
    lawn_parameters = copied(start, torch.float64)
    optimizer = LAWN(make(lawn_parameters), free_steps=free_steps, project_update=project_update)
    runs = {}
    for dtype in (torch.float32, torch.float64):
        parameters = copied(start, dtype)
        runs[dtype] = parameters, make(parameters), {}
    for call in range(1, 6):
        draw_gradients(lawn_parameters)
        for parameters, base, fixed in runs.values():
            projected = [p for p in parameters if p.ndim >= 2]
            if call == free_steps + 1:
                fixed.update({p: p.detach().square().sum().sqrt() for p in projected})
            olds = {}
            for p, twin in zip(parameters, lawn_parameters, strict=True):
                old, g = p.detach().clone(), twin.grad.to(p.dtype)  # type: ignore[union-attr]
                if p in fixed and fixed[p] > 0:
                    olds[p] = old
                    g = g - (g * old).sum() / (old * old).sum() * old
                p.grad = g
            base.step()
            for p, old in olds.items():
                change = p.detach() - old
                if project_update:
                    change = change - (change * old).sum() / (old * old).sum() * old
                new = old + change
                p.data.copy_(fixed[p] * new / new.square().sum().sqrt())
        optimizer.step()
        assert optimizer.step_count == call
        assert optimizer.constrained == (call > free_steps)
        flat = [
            torch.cat([p.detach().flatten() for p in parameters])
            for parameters in (lawn_parameters, runs[torch.float32][0], runs[torch.float64][0])
        ]
        assert_exact(*flat)


@bases
def test_is_the_optimizer_before_the_switch(make: Make) -> None:
    parameters = drawn()
    others = copied(parameters, torch.float64)
    optimizer, plain = LAWN(make(parameters), free_steps=3), make(others)
    for _ in range(3):
        give(parameters, others)
        optimizer.step()
        plain.step()
        assert all(map(torch.equal, parameters, others))
    assert not optimizer.constrained
    give(parameters, others)
    optimizer.step()
    plain.step()
    assert not torch.equal(parameters[0], others[0])
    assert torch.equal(parameters[1], others[1])  # of one dimension
    assert torch.equal(parameters[3], others[3]) == bool(optimizer._norms[parameters[3]] == 0)


@bases
def test_norms_stay(make: Make) -> None:
    parameters = drawn(torch.float32)
    optimizer = LAWN(make(parameters), free_steps=1)
    for call in range(20):
        draw_gradients(parameters)
        if call == 1:
            norms = [p.detach().double().norm() for p in parameters]
        optimizer.step()
    for index in (0, 2):
        norm = parameters[index].detach().double().norm()
        torch.testing.assert_close(norm, norms[index], rtol=1e-6, atol=0)


def test_zeros_at_the_switch_are_free() -> None:
    """And go exactly as the optimizer takes them, later too."""
    parameters = drawn()
    others = copied(parameters, torch.float64)
    optimizer = LAWN(torch.optim.SGD(parameters, lr=0.1), free_steps=0)
    plain = torch.optim.SGD(others, lr=0.1)
    for _ in range(3):
        give(parameters, others)
        optimizer.step()
        plain.step()
        assert torch.equal(parameters[3], others[3])
        assert parameters[3].any()


def test_radial_gradients_move_nothing() -> None:
    p = torch.nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = LAWN(torch.optim.SGD([p], lr=10.0), free_steps=0, project_update=False)
    p.grad = 7 * p.detach()
    optimizer.step()
    truth = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert_exact(p.detach(), truth.float(), truth)


def test_what_the_optimizer_sees_and_what_stays() -> None:
    """The gradient is the same object with the same values; the optimizer saw another one."""
    parameters = drawn()
    seen: list[Tensor] = []
    base = torch.optim.SGD(parameters, lr=0.1)
    base.register_step_pre_hook(lambda *_: seen.extend(p.grad for p in parameters))  # type: ignore[misc]
    optimizer = LAWN(base, free_steps=0)
    draw_gradients(parameters)
    parameters[2].grad = None
    untouched = parameters[2].detach().clone()
    before = [p.detach().clone() for p in parameters]
    kept = [p.grad for p in parameters]
    values = [None if g is None else g.clone() for g in kept]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(parameters, kept, strict=True))
    assert torch.equal(kept[0], values[0])  # type: ignore[arg-type]
    assert abs(float((seen[0] * before[0]).sum())) < 1e-14
    assert seen[1] is kept[1]
    assert torch.equal(parameters[2], untouched)


def test_gradients_come_back_where_the_step_fails() -> None:
    parameters = drawn()
    base = torch.optim.SGD(parameters, lr=0.1)

    def fail(*_: Any) -> None:
        raise RuntimeError("no step")

    base.register_step_pre_hook(fail)
    draw_gradients(parameters)
    kept = [p.grad for p in parameters]
    with pytest.raises(RuntimeError, match="no step"):
        LAWN(base, free_steps=0).step()
    assert all(p.grad is g for p, g in zip(parameters, kept, strict=True))


def test_named_parameters_are_constrained() -> None:
    parameters = drawn()
    optimizer = LAWN(torch.optim.SGD(parameters, lr=0.1), free_steps=0, params=[parameters[1]])
    norms = [p.detach().norm() for p in parameters]
    draw_gradients(parameters)
    optimizer.step()
    same = [
        bool(torch.isclose(p.detach().norm(), n)) for p, n in zip(parameters, norms, strict=True)
    ]
    assert same == [False, True, False, False]


def test_half_precision() -> None:
    parameters = drawn(torch.bfloat16)
    optimizer = LAWN(torch.optim.SGD(parameters, lr=0.1), free_steps=0)
    norm = parameters[0].detach().double().norm()
    for _ in range(5):
        draw_gradients(parameters)
        optimizer.step()
        assert parameters[0].grad is not None
        assert parameters[0].grad.dtype == torch.bfloat16
    torch.testing.assert_close(parameters[0].detach().double().norm(), norm, rtol=2**-8, atol=0)


def through_a_file(optimizer: LAWN, make: Make) -> LAWN:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    other = LAWN(make(copied(parameters, torch.float64)), free_steps=99, project_update=False)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@bases
@pytest.mark.parametrize("before", [1, 3])
@pytest.mark.parametrize("how", ["file", "copy", "pickle"])
def test_copies_go_on(make: Make, before: int, how: str) -> None:
    parameters = drawn()
    one = LAWN(make(parameters), free_steps=2)
    torch.optim.lr_scheduler.StepLR(one, 1)  # replaces step
    for _ in range(before):
        draw_gradients(parameters)
        one.step()
    if how == "file":
        two = through_a_file(one, make)
    else:
        two = copy.deepcopy(one) if how == "copy" else pickle.loads(pickle.dumps(one))
    assert two.step_count == before
    assert two.constrained == (before == 3)
    assert (two.free_steps, two.project_update) == (2, True)
    others = [p for group in two.param_groups for p in group["params"]]
    for _ in range(3):
        give(parameters, others)
        one.step()
        two.step()
        assert all(map(torch.equal, parameters, others))
    assert not {id(p) for p in others} & {id(p) for p in parameters}


def test_is_an_optimizer_with_the_groups_of_the_other() -> None:
    parameters = drawn()
    base = torch.optim.SGD(parameters, lr=1.0)
    optimizer = LAWN(base, free_steps=0)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=4)
    draw_gradients(parameters)
    optimizer.step()
    scheduler.step()
    assert base.param_groups[0]["lr"] == scheduler.get_last_lr()[0] != 1.0
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)
    late = torch.nn.Parameter(torch.ones(2, 2))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    optimizer.step()
    assert float(late.detach().norm()) == pytest.approx(2)
    base.load_state_dict(copy.deepcopy(base.state_dict()))
    assert optimizer.param_groups is base.param_groups


def test_a_scaler_unscales_before_the_projection() -> None:
    plain = drawn(torch.float32)
    scaled = copied(plain, torch.float32)
    optimizers = [
        LAWN(torch.optim.Adam(ps, lr=0.1, fused=True), free_steps=0) for ps in (plain, scaled)
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))  # makes its state
    give(plain, scaled)
    for p in scaled:
        p.grad *= 8  # type: ignore[operator]
    optimizers[0].step()
    scaler.step(optimizers[1])
    scaler.update()
    assert all(map(torch.equal, plain, scaled))


def test_a_closure_is_called_once_before_the_projection() -> None:
    parameters = drawn()
    optimizer = LAWN(torch.optim.SGD(parameters, lr=0.1), free_steps=0)
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p.sum() for p in parameters), torch.zeros(()))
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert isinstance(loss, Tensor)
    assert parameters[3].eq(-0.1).all()


@pytest.mark.untyped
def test_refuses() -> None:
    parameters = drawn(torch.float32)
    base = torch.optim.SGD(parameters, lr=0.1)
    LAWN(base, free_steps=0)
    with pytest.raises(TypeError, match=r"LAWN: optimizer must be a torch.optim.Optimizer, got 3"):
        LAWN(3, free_steps=0)
    with pytest.raises(ValueError, match="LAWN: free_steps must be an int of at least 0, got -1"):
        LAWN(base, free_steps=-1)
    with pytest.raises(TypeError, match="LAWN: project_update must be True or False"):
        LAWN(base, free_steps=0, project_update=1)
    other = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"LAWN: params\[1\] must be a parameter of the optimizer"):
        LAWN(base, free_steps=0, params=[parameters[0], other])
    with pytest.raises(TypeError, match=r"LAWN: params\[0\] must be a floating-point tensor"):
        LAWN(base, free_steps=0, params=["p"])
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.1}]
    with pytest.raises(ValueError, match="LAWN: weight_decay must be 0 in all groups, got 0"):
        LAWN(torch.optim.SGD(groups, lr=0.1), free_steps=0)
    with pytest.raises(ValueError, match="LAWN: weight_decay must be 0 in all groups, got 0"):
        LAWN(base, free_steps=0).add_param_group({"params": [other], "weight_decay": 0.1})
    with pytest.raises(ValueError, match="LAWN: state_dict must have an entry 'lawn'"):
        LAWN(base, free_steps=0).load_state_dict(base.state_dict())
    hooked = Lion(parameters)
    step_in_backward(hooked)
    with pytest.raises(ValueError, match="LAWN: optimizer must not step in the backward pass"):
        LAWN(hooked, free_steps=0)
    parameters[0].grad = torch.ones(3, 5).to_sparse()
    with pytest.raises(TypeError, match="LAWN: gradients must be dense"):
        LAWN(base, free_steps=0).step()
