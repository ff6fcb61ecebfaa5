"""The private names of PyTorch that the library uses still mean what they did."""

from typing import Any, NoReturn

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from tilework import _torch


@pytest.mark.untyped
def test_constant_when_traced() -> None:
    calls = []

    @_torch.constant_when_traced
    def note() -> None:
        calls.append(torch.compiler.is_compiling())

    def function(input: torch.Tensor) -> torch.Tensor:
        note()
        return input + 1

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert calls


@pytest.mark.untyped
def test_autograd_inside_of_an_operator() -> None:
    with torch.library._scoped_library("tilework_test", "DEF") as library:
        library.define("slope(Tensor input) -> Tensor")

        def slope(input: torch.Tensor) -> torch.Tensor:
            with _torch.autograd_enabled():
                leaf = input.detach().requires_grad_()
                return torch.autograd.grad((leaf**3).sum(), leaf)[0]

        library.impl("slope", slope, "CompositeExplicitAutograd")
        for input in (torch.ones(3), torch.ones(3, requires_grad=True)):
            with torch.no_grad():
                result = torch.ops.tilework_test.slope(input)
                assert not torch.is_grad_enabled()
            assert torch.equal(result, torch.full((3,), 3.0))
    double = 2 * torch.ones(2, requires_grad=True)
    assert double.requires_grad


def test_keeps_graph() -> None:
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, input: torch.Tensor) -> torch.Tensor:
            return input.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            seen.append(_torch.keeps_graph())
            return grad

    result = Watch.apply(torch.ones(2, requires_grad=True)).sum()  # type: ignore[no-untyped-call]
    result.backward(retain_graph=True)
    result.backward()
    assert seen == [True, False]


def test_transforms() -> None:
    seen = []

    def function(input: torch.Tensor) -> torch.Tensor:
        seen.append((_torch.transforms_are_active(), _torch.is_transformed(input)))
        return input.sum()

    plain = torch.ones(3)
    function(plain)
    torch.func.grad(function)(plain)
    torch.func.vmap(function)(plain[None])
    assert seen == [(False, False), (True, True), (True, True)]


def test_modes() -> None:
    assert not _torch.modes_are_active()
    with FlopCounterMode(display=False):
        assert _torch.modes_are_active()
    seen = []
    leaf = torch.ones(3, requires_grad=True)
    doubled = 2 * leaf
    doubled.register_hook(lambda grad: seen.append(_torch.modes_are_active()))
    torch.autograd.grad(doubled, leaf, torch.ones(4, 3), retain_graph=True, is_grads_batched=True)
    torch.autograd.grad(doubled, leaf, torch.ones(3))
    assert seen == [True, False]
    assert not _torch.modes_are_active()


def test_flop_counters() -> None:
    with torch.library._scoped_library("tilework_test", "DEF") as library:
        library.define("twice(Tensor input, int count) -> Tensor")
        library.impl("twice", lambda input, count: 2 * input, "CompositeExplicitAutograd")
        operator = torch.ops.tilework_test.twice.default

        def count(input: torch.Tensor, count: int, out_val: torch.Tensor) -> int:
            return count * out_val.numel()

        def total() -> int:
            with FlopCounterMode(display=False) as counter:
                _torch.tell_flop_counters(operator, count)
                operator(torch.ones(3), 5)
            counted: int = counter.get_total_flops()
            return counted

        try:
            assert total() == 15  # of a counter that was there before
            assert torch.ops.tilework_test.twice in flop_counter.flop_registry
        finally:
            flop_counter.flop_registry.pop(torch.ops.tilework_test.twice, None)


def test_autograd_of_an_operator_is_its_own() -> None:
    def refuse(_: object) -> NoReturn:
        raise AssertionError("a hook sees what an operator saves for itself")

    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse), _torch.autograd_enabled():
        leaf = torch.ones(3).requires_grad_()
        (found,) = torch.autograd.grad((leaf**3).sum(), leaf)
    assert torch.equal(found, torch.full((3,), 3.0))


def test_autocast() -> None:
    assert not _torch.autocast_is_active()
    with torch.autocast("cpu"):
        assert _torch.autocast_is_active()
        with torch.autocast("cpu", enabled=False):
            assert not _torch.autocast_is_active()


def test_fake_mode() -> None:
    assert not _torch.is_fake_mode()
    with FlopCounterMode(display=False):
        assert not _torch.is_fake_mode()
        with FakeTensorMode():
            assert _torch.is_fake_mode()
    assert not _torch.is_fake_mode()


def test_forward_mode() -> None:
    assert not _torch.is_forward_mode()
    with forward_ad.dual_level():
        assert _torch.is_forward_mode()
    assert not _torch.is_forward_mode()


def test_bfloat16() -> None:
    assert isinstance(_torch.multiplies_bfloat16(), bool)


def test_gamma() -> None:
    shape = torch.full((20000,), 3.0)
    draws = [_torch.standard_gamma(shape, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)
    assert abs(draws[0].mean().item() - 3) < 0.1
    assert abs(draws[0].var().item() - 3) < 0.3
