"""The rotation is the best of its steps, and changes nothing but the tails."""

from typing import Any

import pytest
import torch
from torch import nn

from tilework.quant import (
    CayleyAdam,
    RotationResult,
    kurtail_rotation,
    kurtosis_loss,
    random_orthogonal_matrix,
    rotate_linear_,
)


def rows() -> torch.Tensor:
    x = torch.randn(40, 6, dtype=torch.float64)
    x[:, 2] *= 15
    return x


@pytest.mark.parametrize("start", [False, True])
def test_it_is_the_best_of_the_steps(start: bool) -> None:
    x = rows()
    initial = random_orthogonal_matrix(6, dtype=torch.float64) if start else None
    found = kurtail_rotation(x, steps=12, lr=0.2, betas=(0.8, 0.9), target=2.0, initial=initial)
    rotation = nn.Parameter(
        torch.eye(6, dtype=torch.float64) if initial is None else initial.clone()
    )
    optimizer = CayleyAdam([rotation], 0.2, (0.8, 0.9))
    losses, seen = [], []
    for _ in range(13):
        loss = kurtosis_loss(x @ rotation, target=2.0)
        losses.append(loss.item())
        seen.append(rotation.detach().clone())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = losses.index(min(losses))
    torch.testing.assert_close(found.losses, torch.tensor(losses, dtype=torch.float64))
    assert found.best_step == best
    torch.testing.assert_close(found.rotation, seen[best])
    torch.testing.assert_close(
        found.rotation.T @ found.rotation, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-10
    )
    assert isinstance(found, RotationResult)
    assert found.losses.min() <= found.losses[0]


def test_it_lowers_the_loss_and_keeps_the_network() -> None:
    torch.manual_seed(0)
    x = rows()
    found = kurtail_rotation(x)
    assert found.losses.min() < 0.5 * found.losses[0]
    layer = nn.Linear(6, 3).double()
    before = layer(x)
    rotate_linear_(layer, found.rotation)
    torch.testing.assert_close(layer(x @ found.rotation), before)


def test_no_steps_and_no_gradients_outside() -> None:
    x = rows().float().requires_grad_()
    with torch.no_grad():
        found = kurtail_rotation(x.reshape(2, 20, 6), steps=0)
    assert torch.equal(found.rotation, torch.eye(6))
    assert (found.best_step, found.losses.shape) == (0, (1,))
    with torch.no_grad():
        assert kurtail_rotation(x.bfloat16(), steps=2).rotation.dtype == torch.float32
    assert x.grad is None


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"initial": 1.1 * torch.eye(3)}, ValueError, "initial must be orthogonal"),
        ({"initial": torch.eye(2)}, ValueError, r"initial must be of shape \(3, 3\)"),
        ({"initial": torch.eye(3).long()}, TypeError, "initial must be a floating-point tensor"),
        ({"initial": torch.full((3, 3), torch.nan)}, ValueError, "initial must be finite"),
        ({"steps": -1}, ValueError, "steps must be an int of at least 0"),
        ({"target": torch.nan}, ValueError, "target must be a finite number"),
        ({"input": torch.ones(0, 3)}, ValueError, "input must be non-empty"),
        ({"input": torch.tensor(1.0)}, ValueError, "input must be of shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^kurtail_rotation: {message}"):
        kurtail_rotation(**({"input": torch.ones(2, 3)} | change))
