"""Soft symmetric cross-entropy, against torch's cross-entropy with probabilities as targets."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.losses import SoftSymmetricCrossEntropyLoss, soft_symmetric_cross_entropy

import samples
from losses.samples import Arguments, Loss


def definition(
    input: Tensor, teacher_input: Tensor, *, alpha: float = 0.5, reduction: str = "mean"
) -> Tensor:
    dim = min(input.dim() - 1, 1)
    teacher_input = teacher_input.detach()
    forward = F.cross_entropy(input, teacher_input.softmax(dim), reduction="none")
    backward = F.cross_entropy(teacher_input, input.softmax(dim), reduction="none")
    losses = (1 - alpha) * forward + alpha * backward
    return losses if reduction == "none" else getattr(losses, reduction)()


def draw(*shape: int) -> Arguments:
    return {
        "input": 2 * torch.randn(shape, dtype=torch.float64),
        "teacher_input": 2 * torch.randn(shape, dtype=torch.float64),
    }


ARGUMENTS: dict[str, Any] = {
    "function": soft_symmetric_cross_entropy,
    "definition": definition,
    "module": SoftSymmetricCrossEntropyLoss,
    "options": ({}, {"alpha": 0.2}),
    "batched": ("input", "teacher_input"),
    "class_index": False,
}


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            tensors=lambda: draw(13, 7),
            accepts={"input": torch.zeros(4, 3), "teacher_input": torch.zeros(4, 3)},
            refuses=(
                ("input must be of shape", ValueError, {"input": torch.zeros(())}),
                (
                    "teacher_input must be of shape",
                    ValueError,
                    {"teacher_input": torch.zeros(4, 2)},
                ),
                (
                    "teacher_input must be a floating",
                    TypeError,
                    {"teacher_input": torch.zeros(4).int()},
                ),
                ("alpha must be a number from 0 to 1", ValueError, {"alpha": 1.5}),
                ("alpha must be a number from 0 to 1", ValueError, {"alpha": -0.1}),
                ("alpha must be a number", TypeError, {"alpha": "0.5"}),
            ),
            **ARGUMENTS,
        ),
        Loss(tensors=lambda: draw(3, 5, 4, 2), **ARGUMENTS),
    ]


@pytest.mark.parametrize("shape", [(7,), (1, 1), (63, 100), (2, 3, 5)])
def test_limits(shape: tuple[int, ...]) -> None:
    tensors = draw(*shape)
    input, teacher_input = tensors.values()
    dim = min(len(shape) - 1, 1)
    q = teacher_input.softmax(dim)
    for reduction in ("none", "sum", "mean"):
        forward = soft_symmetric_cross_entropy(**tensors, alpha=0.0, reduction=reduction)
        torch.testing.assert_close(forward, F.cross_entropy(input, q, reduction=reduction))
        backward = soft_symmetric_cross_entropy(**tensors, alpha=1.0, reduction=reduction)
        swapped = soft_symmetric_cross_entropy(teacher_input, input, alpha=0.0, reduction=reduction)
        torch.testing.assert_close(backward, swapped)
    entropy = torch.special.entr(q).sum(dim)
    for alpha in (0.0, 0.3, 1.0):
        same = soft_symmetric_cross_entropy(
            teacher_input, teacher_input, alpha=alpha, reduction="none"
        )
        torch.testing.assert_close(same, entropy)


@given(st.floats(0, 1), st.floats(-50, 50), st.floats(-50, 50), st.integers(0, 10**6))
def test_symmetry_and_shifts(alpha: float, shift: float, teacher: float, seed: int) -> None:
    torch.manual_seed(seed)
    input, teacher_input = draw(5, 6).values()
    loss = soft_symmetric_cross_entropy(input, teacher_input, alpha=alpha)
    torch.testing.assert_close(
        soft_symmetric_cross_entropy(teacher_input, input, alpha=1 - alpha), loss
    )
    torch.testing.assert_close(
        soft_symmetric_cross_entropy(input + shift, teacher_input + teacher, alpha=alpha), loss
    )


def test_the_teacher_gets_no_gradient() -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in draw(5, 6).items()}
    soft_symmetric_cross_entropy(**tensors).backward()
    assert tensors["input"].grad is not None
    assert tensors["teacher_input"].grad is None


def test_a_teacher_of_another_dtype_and_nan_in_it() -> None:
    input, teacher_input = draw(5, 6).values()
    expected = definition(input.float().double(), teacher_input)
    actual = soft_symmetric_cross_entropy(input.float(), teacher_input)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)
    teacher_input[2, 3] = torch.nan
    losses = soft_symmetric_cross_entropy(input, teacher_input, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_logits(dtype: torch.dtype) -> None:
    size = 1e4 if dtype == torch.float32 else 60000.0
    input = torch.tensor([[size, -size]], dtype=dtype, requires_grad=True)
    teacher_input = torch.tensor([[-size, size]], dtype=dtype)
    loss = soft_symmetric_cross_entropy(input, teacher_input, reduction="sum")
    assert loss.item() == (2 * size if dtype == torch.float32 else math.inf)
    (gradient,) = torch.autograd.grad(loss, input)
    # Of the first part alone: the student's own probabilities do not move.
    assert gradient.tolist() == [[0.5, -0.5]]
