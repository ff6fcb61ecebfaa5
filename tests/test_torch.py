"""The private names of PyTorch that the library uses still mean what they did."""

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from tilework import _torch


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
    assert not _torch.modes_are_active()


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
