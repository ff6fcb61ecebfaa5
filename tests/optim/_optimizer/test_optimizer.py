"""The base of optimizers, by toys that show what no optimizer has alone."""

import copy
import gc
import itertools
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Any

import pytest
import torch
from torch import Tensor

from tilework import _torch
from tilework.optim._optimizer import (
    DecoupledDecay,
    Numbers,
    Optimizer,
    dot,
    function,
    largest,
    option,
    optional,
    rate,
    updates,
    where,
)


class Mapped(Optimizer):
    """Has an option that is a function."""

    lr: float | Tensor = option(1.0, rate)
    _: KW_ONLY
    transform: Callable[[Tensor], Tensor] | None = option(None, optional(function))

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        return p - group["lr"] * group["transform"](g)


class Normed(Optimizer):
    """Moves by the gradient over the norm of all."""

    lr: float | Tensor = option(1.0, rate)

    def _numbers(self, group: Numbers) -> dict[str, Any]:
        return {"norm": group["square"] ** 0.5}

    @staticmethod
    def _measure(
        p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers
    ) -> dict[str, Tensor]:
        return {"square": g.square().sum()}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        return p - group["lr"] * g / group["norm"]


class NormedByGroup(Normed):
    _measures_each_group = True


def parameter(*values: float) -> torch.nn.Parameter:
    result = torch.nn.Parameter(torch.zeros(len(values)))
    result.grad = torch.tensor(values)
    return result


def test_functions_are_not_saved_and_stay() -> None:
    optimizer = Mapped([parameter(1.0)], transform=torch.neg)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["transform"] is None
    assert optimizer.param_groups[0]["transform"] is torch.neg
    other = Mapped([parameter(1.0)], transform=torch.abs)
    other.load_state_dict(saved)
    assert other.param_groups[0]["transform"] is torch.abs
    assert copy.deepcopy(other).param_groups[0]["transform"] is torch.abs
    with pytest.raises(TypeError, match="Mapped: transform must be a callable or None, got 3"):
        Mapped([parameter(1.0)], transform=3)  # type: ignore[arg-type]


def test_loading_does_not_change_the_shared_cast() -> None:
    """torch.optim's own optimizers cast as before, and hooks of users come first."""
    optimizer = Mapped([parameter(1.0)], transform=torch.neg)
    seen = []

    def hook(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(state_dict["param_groups"][0]["lr"])
        state_dict["param_groups"][0]["lr"] = 0.5
        return state_dict

    optimizer.register_load_state_dict_pre_hook(hook)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [1.0]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert list(optimizer._optimizer_load_state_dict_pre_hooks.values()) == [hook]


@pytest.mark.parametrize("capturable", [False, True])
def test_measures_sum_over_all_or_over_a_group(capturable: bool) -> None:
    for kind, norms in ((Normed, (13.0, 13.0)), (NormedByGroup, (5.0, 12.0))):
        first, second = parameter(3.0, 4.0), parameter(12.0)
        groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second]}]
        kind(groups, capturable=capturable).step()
        torch.testing.assert_close(first.detach(), torch.tensor([-3.0, -4.0]) / norms[0])
        torch.testing.assert_close(second.detach(), torch.tensor([-12.0]) / norms[1])


def test_groups_stay_as_they_were_given() -> None:
    given = {"params": [parameter(1.0)], "lr": 0.5}
    optimizer = Normed([given])
    assert given.keys() == {"params", "lr"}
    with pytest.raises(ValueError, match="lr must be a number of at least 0"):
        optimizer.add_param_group({"params": [parameter(1.0)], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def test_decay_refers_to_the_rate_of_each_group() -> None:
    class Decayed(DecoupledDecay, Normed):
        weight_decay: float = option(0.1, lambda optimizer, name, value: value)

    groups: list[dict[str, Any]] = [{"params": [parameter(1.0)], "lr": lr} for lr in (0.1, 0.2)]
    optimizer = Decayed(groups)
    assert [group["reference_lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["reference_lr"]
    optimizer.load_state_dict(saved)
    assert [group["reference_lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_numbers_choose_as_tensors_do() -> None:
    for t in (1, 2, 3):
        chosen = where(torch.tensor(t) > 1, 0.1, torch.tensor(0.2))
        assert chosen.dtype == torch.float64
        assert float(chosen) == pytest.approx(where(t > 1, 0.1, 0.2))


@pytest.mark.parametrize("shape", [(), (7,), (40, 3), (5, 4, 6), (3, 50)])
@pytest.mark.parametrize("block", [6, 64, 2**17])
def test_products_are_summed_in_blocks(
    shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "CPU", updates.CPU._replace(block=block))
    a, b = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(dot(a, b), torch.einsum("...,...->...", a, b).sum())
    for count in range(1, len(shape) + 1):
        for dims in itertools.combinations(range(len(shape)), count):
            expected = a.multiply(b).numpy().sum(dims, keepdims=True)
            torch.testing.assert_close(dot(a, b, dims), torch.from_numpy(expected))


def test_the_largest_may_be_negative() -> None:
    assert largest(torch.tensor([1.0, -3.0, 2.0])) == 3
    assert largest(torch.tensor([1.0, -3.0, 4.0])) == 4
    assert largest(torch.tensor([1.0, torch.nan])).isnan()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_step_leaves_the_garbage_collector_as_it_was(enabled: bool) -> None:
    seen = []

    def transform(gradient: Tensor) -> Tensor:
        seen.append(gc.isenabled())
        raise ValueError("transform")

    optimizer = Mapped([parameter(1.0)], transform=transform)
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(ValueError, match="transform"):
            optimizer.step()
        assert seen == [False]
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if before else gc.disable()


@pytest.mark.untyped
def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def fail(rule: Any) -> Any:
        def call(*arguments: Any) -> None:
            try:
                raise InvalidCxxCompiler("g++")
            except InvalidCxxCompiler as error:
                raise RuntimeError("backend failed") from error

        return call

    monkeypatch.setattr(updates, "compiled", fail)
    with pytest.raises(RuntimeError, match="compiled=True needs a compiler"):
        Mapped([parameter(1.0)], transform=torch.neg, compiled=True).step()
    assert not _torch.is_missing_compiler(RuntimeError("else"))


@pytest.mark.parametrize("capturable", [False, True])
def test_steps_that_read_numbers_are_not_captured(
    capturable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream:
        def is_capturing(self) -> bool:
            return True

    device = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: Stream())
    optimizer = Normed([parameter(3.0, 4.0)], capturable=capturable)
    if capturable:
        optimizer.step()
    else:
        with pytest.raises(RuntimeError, match="graph capture of step"):
            optimizer.step()
