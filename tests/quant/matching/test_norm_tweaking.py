"""Only norms are trained, and all else of a block stays as it was."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tilework import norms
from tilework.quant import distribution_loss, norm_tweaking_, norm_tweaking_lr


def test_the_rate_rises_with_depth() -> None:
    for layer in range(5):
        expected = 2e-5 * (1 + 3.0 * layer / 5)
        assert norm_tweaking_lr(layer, 5, lr=2e-5, scale=3.0) == pytest.approx(expected)
    assert norm_tweaking_lr(1, 2) == pytest.approx(1e-5 * 3.5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(6), norms.RMSNorm(6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.group = nn.GroupNorm(2, 6)

    def forward(self, input: Tensor) -> Any:
        x = input + self.down(torch.relu(self.up(self.first(input))))
        return self.group(self.second(x).mT).mT, "cache"


def problem() -> tuple[Block, list[Tensor], list[Tensor]]:
    torch.manual_seed(1)
    block = Block()
    inputs = [torch.randn(4, 5, 6) for _ in range(3)]
    with torch.no_grad():
        targets = [block(x)[0] * 1.1 + 0.2 for x in inputs]
    return block, inputs, targets


def test_steps_are_those_of_adam_on_norms_alone() -> None:
    block, inputs, targets = problem()
    other = copy.deepcopy(block)
    losses = norm_tweaking_(block, inputs, targets, lr=1e-2, iterations=2)
    trained = [
        p for n, p in other.named_parameters() if n.split(".")[0] in ("first", "second", "group")
    ]
    optimizer = torch.optim.Adam(trained, 1e-2)
    expected = []
    for _ in range(2):
        for x, y in zip(inputs, targets, strict=True):
            loss = distribution_loss(other(x)[0], y)
            expected.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses == pytest.approx(expected)
    for (name, one), two in zip(block.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=name)
    assert losses[-1] < losses[0]


def test_everything_else_stays() -> None:
    block, inputs, targets = problem()
    block.up.weight.requires_grad_(False)
    block.first.weight.requires_grad_(False)
    block.up.bias.grad = torch.ones(12)
    block.first.bias.grad = torch.ones(6)
    block.first.eval()
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    with torch.no_grad():
        norm_tweaking_(block, inputs, targets, lr=1e-2)
    for name, p in block.named_parameters():
        is_norm = name.split(".")[0] in ("first", "second", "group")
        assert torch.equal(p, before[name]) != is_norm, name
        assert p.requires_grad == (name not in ("up.weight", "first.weight"))
        given = {"up.bias": 12, "first.bias": 6}.get(name)
        assert (p.grad is None) == (given is None)
        if given is not None:
            assert torch.equal(p.grad, torch.ones(given))  # type: ignore[arg-type]
    assert not block.first.training
    assert block.second.training


def test_equal_statistics_change_nothing() -> None:
    block, inputs, _ = problem()
    with torch.no_grad():
        targets = [block(x)[0] for x in inputs]
    before = copy.deepcopy(block.state_dict())
    losses = norm_tweaking_(block, inputs, targets, lr=1e-2)
    assert losses == [0.0] * 3
    assert all(torch.equal(block.state_dict()[key], before[key]) for key in before)


def test_a_forward_of_the_callers_and_an_error_in_it() -> None:
    block, inputs, targets = problem()
    calls = []

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) > 1:
            raise RuntimeError
        result: Tensor = module(x)[0]
        return result

    block.down.weight.grad = torch.ones(6, 12)
    with pytest.raises(RuntimeError):
        norm_tweaking_(block, inputs, targets, forward=forward)
    assert len(calls) == 2
    assert all(p.requires_grad for p in block.parameters())
    assert torch.equal(block.down.weight.grad, torch.ones(6, 12))


@pytest.mark.untyped
def test_refusals() -> None:
    block, inputs, targets = problem()
    with pytest.raises(ValueError, match=r"^norm_tweaking_: block must have norms"):
        norm_tweaking_(nn.Linear(2, 2), inputs, targets)
    with pytest.raises(ValueError, match=r"^norm_tweaking_: targets must be a sequence of 3"):
        norm_tweaking_(block, inputs, targets[:2])
    with pytest.raises(TypeError, match=r"^norm_tweaking_: block must be a module"):
        norm_tweaking_("block", inputs, targets)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^norm_tweaking_: iterations must be an int of at l"):
        norm_tweaking_(block, inputs, targets, iterations=0)
    with pytest.raises(ValueError, match=r"^norm_tweaking_lr: layer must be an int from 0 to 2"):
        norm_tweaking_lr(3, 3)
    with pytest.raises(TypeError, match=r"^norm_tweaking_lr: layer must be an int"):
        norm_tweaking_lr(1.0, 3)  # type: ignore[arg-type]
