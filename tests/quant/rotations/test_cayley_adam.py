"""Steps against plain formulas, and matrices that stay orthogonal."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tilework.quant import CayleyAdam, random_orthogonal_matrix


def plain(start: Tensor, gradients: list[Tensor], lr: float, betas: Any, eps: float) -> Tensor:
    """By the page, with an inverse."""
    rotation, mean, square = start.clone(), torch.zeros_like(start), 0.0
    identity = torch.eye(len(start), dtype=start.dtype)
    for t, gradient in enumerate(gradients, 1):
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * float((gradient**2).sum())
        root = (square / (1 - betas[1] ** t)) ** 0.5 + eps
        direction = mean / (1 - betas[0] ** t) / root
        skew = direction @ rotation.T - rotation @ direction.T
        inverse = torch.linalg.inv(identity + lr / 2 * skew)
        rotation = inverse @ (identity - lr / 2 * skew) @ rotation
    return rotation


@pytest.mark.parametrize("maximize", [False, True])
def test_steps(maximize: bool) -> None:
    start = torch.stack([random_orthogonal_matrix(5, dtype=torch.float64) for _ in range(2)])
    single = random_orthogonal_matrix(3, dtype=torch.float64)
    stack, other = nn.Parameter(start.clone()), nn.Parameter(single.clone())
    options: dict[str, Any] = {"lr": 0.3, "betas": (0.8, 0.95), "eps": 1e-3}
    optimizer = CayleyAdam([stack, other], **options, maximize=maximize)
    gradients = [torch.randn(2, 5, 5, dtype=torch.float64) for _ in range(4)]
    others = [torch.randn(3, 3, dtype=torch.float64) for _ in range(4)]
    for gradient, more in zip(gradients, others, strict=True):
        stack.grad, other.grad = gradient.clone(), more.clone()
        optimizer.step()
        for matrix in (*stack, other):
            identity = torch.eye(len(matrix), dtype=torch.float64)
            torch.testing.assert_close(matrix.T @ matrix, identity, rtol=0, atol=1e-12)
        assert torch.equal(stack.grad, gradient)
    sign = -1 if maximize else 1
    for index in range(2):
        expected = plain(start[index], [sign * g[index] for g in gradients], **options)
        torch.testing.assert_close(stack.data[index], expected)
    torch.testing.assert_close(other.data, plain(single, [sign * g for g in others], **options))
    assert set(optimizer.state[stack]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[stack]["exp_avg_sq"].shape == (2,)


def test_it_descends_and_goes_on_from_a_checkpoint() -> None:
    torch.manual_seed(0)
    goal = random_orthogonal_matrix(6)
    goal[0] *= torch.linalg.det(goal).sign()
    rotation = nn.Parameter(torch.eye(6))
    optimizer = CayleyAdam([rotation], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (rotation - goal).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]
    other = nn.Parameter(rotation.detach().clone())
    again = CayleyAdam([other], lr=0.5)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rotation.grad = other.grad = torch.ones(6, 6)
    optimizer.step()
    again.step()
    assert torch.equal(rotation, other)


def test_groups_halves_and_what_has_no_gradient() -> None:
    first, second = nn.Parameter(torch.eye(3).bfloat16()), nn.Parameter(torch.eye(2))
    optimizer = CayleyAdam([{"params": [first], "lr": 0.2}, {"params": [second]}])
    first.grad = torch.randn(3, 3).bfloat16()
    assert optimizer.step() is None
    assert optimizer.state[first]["exp_avg"].dtype == torch.float32
    assert torch.equal(second, torch.eye(2))
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 1e-2]
    optimizer.add_param_group({"params": [nn.Parameter(torch.eye(2))]})
    assert len(optimizer.param_groups) == 3


def test_a_schedule_and_accelerated_loops_see_an_optimizer() -> None:
    rotation = nn.Parameter(torch.eye(2))
    optimizer = CayleyAdam([rotation], lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=2)
    rotation.grad = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("parameter", "options", "error", "message"),
    [
        (torch.ones(2, 3), {}, ValueError, r"params must be of shape \(..., n, n\)"),
        (torch.ones(2), {}, ValueError, r"params must be of shape \(..., n, n\)"),
        (torch.eye(2).cfloat(), {}, TypeError, "params must be a floating-point tensor"),
        (torch.eye(2), {"lr": -1.0}, ValueError, "lr must be a finite number of at least 0"),
        (torch.eye(2), {"betas": (0.9, 1.0)}, ValueError, "betas must be numbers from 0"),
        (torch.eye(2), {"betas": (0.9,)}, TypeError, "betas must be a pair"),
        (torch.eye(2), {"eps": 0.0}, ValueError, "eps must be a finite number above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(
    parameter: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"^CayleyAdam: {message}"):
        CayleyAdam([nn.Parameter(parameter)], **options)


def test_sparse_gradients_are_refused() -> None:
    rotation = nn.Parameter(torch.eye(2))
    rotation.grad = torch.eye(2).to_sparse()
    with pytest.raises(TypeError, match=r"^CayleyAdam: gradient must be dense"):
        CayleyAdam([rotation]).step()
