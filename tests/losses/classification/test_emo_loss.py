"""EMO, against the distance to the mean embedding, and loops over classes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilework.losses import EMOLoss, emo_loss

import samples
from helpers import HALF
from losses.samples import Arguments, Loss, class_index, zeros


def distances(input: Tensor, target: Tensor, cost_embedding: Tensor) -> Tensor:
    """What it costs on average to move a sampled class to the target."""
    rows = cost_embedding.detach()
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-12)
    return (1 - (rows[target] * (input.softmax(1) @ rows)).sum(1)).clamp(min=0)


def definition(
    input: Tensor,
    target: Tensor,
    cost_embedding: Tensor,
    *,
    eps: float = 1e-10,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    dtype = input.dtype
    if dtype in HALF:  # which has neither eps nor the smallest norm
        input, cost_embedding = input.float(), cost_embedding.float()
    nll = F.cross_entropy(input, target, ignore_index=ignore_index, reduction="none")
    kept = target != ignore_index
    cost = distances(input, target.where(kept, 0), cost_embedding).where(kept, 1)
    losses = 0.5 * (nll + (nll / (cost + eps)).detach() * cost)
    if reduction != "none":
        losses = losses.sum() if reduction == "sum" else losses.sum() / kept.sum()
    return losses.to(dtype)


def draw(features: int = 4) -> Arguments:
    """With a row of zeros."""
    cost_embedding = torch.randn(7, features, dtype=torch.float64)
    cost_embedding[2] = 0
    return class_index(13) | {"cost_embedding": cost_embedding}


ARGUMENTS: dict[str, Any] = {
    "function": emo_loss,
    "definition": definition,
    "module": EMOLoss,
    "options": ({}, {"eps": 0.3}),
    "owned": ("cost_embedding",),
    "checks_owned": True,
    "surrogate": True,
}


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            tensors=draw,
            accepts=zeros() | {"cost_embedding": torch.ones(3, 2)},
            refuses=(
                (
                    r"cost_embedding must be of shape \(classes, features\)",
                    ValueError,
                    {"cost_embedding": torch.ones(3)},
                ),
                (
                    "cost_embedding must be a floating",
                    TypeError,
                    {"cost_embedding": torch.ones(3, 2).int()},
                ),
                ("eps must be a finite number above 0", ValueError, {"eps": 0.0}),
                ("eps must be a number", TypeError, {"eps": "0"}),
            ),
            **ARGUMENTS,
        ),
        Loss(tensors=lambda: draw(features=100), **ARGUMENTS),
    ]


def test_value_is_cross_entropy() -> None:
    input, target, cost_embedding = draw().values()
    for reduction in ("none", "sum", "mean"):
        torch.testing.assert_close(
            emo_loss(input, target, cost_embedding, reduction=reduction),
            F.cross_entropy(input, target, reduction=reduction),
            rtol=1e-8,
            atol=0,
        )


def test_gradient_by_its_formula() -> None:
    """Class by class, in loops; two rows have the same direction."""
    input, target, cost_embedding = draw().values()
    cost_embedding[1] = 3 * cost_embedding[4]
    input.requires_grad_()
    (actual,) = torch.autograd.grad(
        emo_loss(input, target, cost_embedding, eps=0.1, reduction="sum"), input
    )
    for row, label, gradient in zip(input.detach(), target.tolist(), actual, strict=True):
        if label == -100:
            assert not gradient.any()
            continue
        q = row.softmax(0)
        costs = 1 - F.cosine_similarity(cost_embedding, cost_embedding[label], dim=1)
        distance = sum(q[v] * costs[v] for v in range(7))
        nll = -q[label].log()
        for v in range(7):
            likelihood = q[v] - float(v == label)
            transport = q[v] * (costs[v] - distance)
            expected = (likelihood + nll / (distance + 0.1) * transport) / 2
            torch.testing.assert_close(gradient[v], expected)


@pytest.mark.untyped
def test_derivatives_where_the_bracket_is_constant() -> None:
    input, target, cost_embedding = draw().values()
    kept = target.where(target >= 0, 0)
    eps = 0.1

    def gradient(input: Tensor) -> Tensor:
        loss = emo_loss(input, kept, cost_embedding, eps=eps, reduction="sum")
        return torch.autograd.grad(loss, input, create_graph=True)[0]

    def bracketed(ratio: Tensor) -> Any:
        def value(input: Tensor) -> Tensor:
            nll = F.cross_entropy(input, kept, reduction="none")
            return (nll + ratio * distances(input, kept, cost_embedding)).sum() / 2

        return value

    input.requires_grad_()
    nll = F.cross_entropy(input, kept, reduction="none")
    ratio = (nll / (distances(input, kept, cost_embedding) + eps)).detach()
    torch.testing.assert_close(gradient(input), torch.func.grad(bracketed(ratio))(input))
    direction = torch.randn_like(input)
    second = torch.autograd.grad(gradient(input), input, direction)[0]
    expected = torch.autograd.functional.hvp(bracketed(ratio), input, direction)[1]
    torch.testing.assert_close(second, expected)


def test_orthonormal_embedding() -> None:
    """Every wrong class costs 1: D = 1 - Q, and the parts differ by a factor."""
    input, target = class_index(9).values()
    kept = target.where(target >= 0, 0)
    input.requires_grad_()
    q = input.softmax(1).gather(1, kept[:, None])[:, 0]
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    (actual,) = torch.autograd.grad(
        emo_loss(input, kept, rotation, eps=0.2, reduction="sum"), input
    )
    nll = -q.log()
    (expected,) = torch.autograd.grad(
        (nll + (nll / (1 - q + 0.2)).detach() * (1 - q)).sum() / 2, input
    )
    torch.testing.assert_close(actual, expected)


def test_rotating_and_rescaling_rows_changes_nothing() -> None:
    input, target, cost_embedding = draw().values()
    input.requires_grad_()
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    scales = torch.rand(7, 1).double() + 0.1
    results = [
        torch.autograd.grad(emo_loss(input, target, rows, eps=0.2), input)[0]
        for rows in (cost_embedding, cost_embedding @ rotation, cost_embedding * scales)
    ]
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_rows_below_the_smallest_norm() -> None:
    input, target, cost_embedding = draw().values()
    cost_embedding[3] *= 4e-13 / cost_embedding[3].norm()
    input.requires_grad_()
    for loss in (emo_loss, definition):
        loss(input, target, cost_embedding, reduction="sum").backward()
        gradient, input.grad = input.grad, None
        if loss is emo_loss:
            actual = gradient
    torch.testing.assert_close(actual, gradient)


def test_sure_of_the_target() -> None:
    """Where D is small, float32 has it to its own digits: the gradient does not explode."""
    margins = torch.linspace(5, 25, 63)
    input = torch.randn(63, 100)
    target = torch.randint(100, (63,))
    top = input.amax(1) + margins
    input.scatter_(1, target[:, None], top[:, None])
    cost_embedding = torch.randn(100, 64)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = input.to(dtype).requires_grad_()
        loss = emo_loss if dtype == torch.float32 else definition
        result = loss(leaf, target, cost_embedding.to(dtype), reduction="sum")
        gradients.append(torch.autograd.grad(result, leaf)[0].double())
    torch.testing.assert_close(*gradients, rtol=0, atol=4e-7)


def test_classes_that_cost_nothing() -> None:
    """The clamp holds rounding off: there is no distance, and its gradient is 0."""
    direction = torch.randn(100)
    cost_embedding = torch.rand(63, 1) * direction
    input = torch.randn(100, 63, requires_grad=True)
    target = torch.randint(63, (100,))
    nll = F.cross_entropy(input, target, reduction="none")
    losses = emo_loss(input, target, cost_embedding, eps=1e-7, reduction="none")
    assert (losses >= 0.499 * nll).all()
    assert (losses <= 1.001 * nll).all()
    loss = emo_loss(input, target, cost_embedding, eps=1.0)
    expected = F.cross_entropy(input, target) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, input)[0],
        torch.autograd.grad(expected, input)[0],
        rtol=0,
        atol=1e-7,
    )


def test_the_embedding_gets_no_gradient() -> None:
    tensors = draw()
    for name in ("input", "cost_embedding"):
        tensors[name].requires_grad_()
    emo_loss(**tensors).backward()
    assert tensors["input"].grad is not None
    assert tensors["cost_embedding"].grad is None


def test_the_module_has_a_copy() -> None:
    input, target, cost_embedding = draw().values()
    embedding = torch.nn.Parameter(cost_embedding)
    criterion = EMOLoss(embedding, eps=0.2)
    assert not list(criterion.parameters())
    leaf = input.requires_grad_()
    (before,) = torch.autograd.grad(criterion(input, target), leaf)
    with torch.no_grad():
        embedding.add_(1)
    (after,) = torch.autograd.grad(criterion(input, target), leaf)
    assert torch.equal(before, after)
    criterion.load_state_dict({"cost_embedding": embedding.detach()})
    (loaded,) = torch.autograd.grad(criterion(input, target), leaf)
    (expected,) = torch.autograd.grad(emo_loss(input, target, embedding, eps=0.2), leaf)
    assert torch.equal(loaded, expected)


@pytest.mark.untyped
def test_embedding_of_other_classes() -> None:
    tensors = {"input": torch.zeros(4, 3), "target": torch.zeros(4, dtype=torch.int64)}
    for embedding in (torch.ones(4, 2), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"emo_loss: cost_embedding must be of shape \(3, fea"):
            emo_loss(**tensors, cost_embedding=embedding)
