"""Squentropy, against torch's cross-entropy and a masked mean of squares."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.losses import SquentropyLoss, linear_squentropy, squentropy

import samples
from helpers import HALF, assert_exact, dtype_name
from losses.linear_cross_entropy.problem import Problem
from losses.linear_forms import LinearForm
from losses.samples import Loss, class_index


def definition(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    classes = input.shape[1]
    losses = F.cross_entropy(input, target, weight, ignore_index=ignore_index, reduction="none")
    kept = target != ignore_index
    index = target.where(kept, 0)
    weights = kept.to(input.dtype) if weight is None else weight[index] * kept
    wrong = 1 - F.one_hot(index, classes).to(input.dtype)
    losses = losses + weights * (input.square() * wrong).sum(1) / (classes - 1)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / weights.sum()


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            squentropy,
            definition,
            SquentropyLoss,
            refuses=(
                ("input must be of shape .*, C >= 2", ValueError, {"input": torch.zeros(4, 1)}),
                ("weight must be of shape", ValueError, {"weight": torch.ones(4)}),
                (
                    "weight must not require",
                    ValueError,
                    {"weight": torch.ones(3, requires_grad=True)},
                ),
            ),
        ),
        Loss(squentropy, definition, SquentropyLoss, lambda: class_index(13, weight=True)),
    ]


FORM = LinearForm(linear_squentropy, definition, weight=True)


@samples.of(LinearForm)
def forms() -> list[LinearForm]:
    return [FORM]


@given(st.integers(2, 100), st.integers(0, 10**6))
def test_gradient_of_the_true_logit_is_that_of_cross_entropy(classes: int, seed: int) -> None:
    torch.manual_seed(seed)
    input = torch.randn(5, classes, dtype=torch.float64, requires_grad=True)
    target = torch.randint(classes, (5,))
    (actual,) = torch.autograd.grad(squentropy(input, target), input)
    (expected,) = torch.autograd.grad(F.cross_entropy(input, target), input)
    at_target = target[:, None]
    torch.testing.assert_close(actual.gather(1, at_target), expected.gather(1, at_target))
    others = torch.ones_like(actual).scatter(1, at_target, 0) * 2 * input / (classes - 1) / 5
    torch.testing.assert_close(actual - expected, others.detach())


def test_is_not_invariant_to_a_shift_but_to_a_permutation() -> None:
    input, target = class_index(9).values()
    assert not torch.isclose(squentropy(input + 1, target), squentropy(input, target))
    order = torch.randperm(7)
    moved = torch.argsort(order)[target.clamp(min=0)].where(target >= 0, -100)
    torch.testing.assert_close(squentropy(input[:, order], moved), squentropy(input, target))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_name)
@pytest.mark.parametrize("implementation", ["tiled", "reference"])
def test_linear_form_where_hidden_states_cancel(implementation: str, dtype: torch.dtype) -> None:
    """Orthogonal to what all classes have in common, where a Gram matrix loses digits twice."""
    problem = Problem.random(40, 64, 200, bias=True)
    common = 10 * torch.randn(64)
    with torch.no_grad():
        problem.linear_weight.add_(common)
        problem.input.sub_(torch.outer(problem.input @ common, common) / common.square().sum())
    problem = problem.to(dtype)
    problem.options["implementation"] = implementation
    actual = problem.solve(linear_squentropy)
    problem.options = {}
    truth = problem.to(torch.float64).solve(FORM.composed)
    for results in zip(actual, problem.solve(FORM.composed), truth, strict=True):
        assert_exact(*results, dtype)


@pytest.mark.parametrize("implementation", ["tiled", "reference"])
def test_linear_form_leaves_the_target_out(implementation: str) -> None:
    """A target whose square would swallow the others."""
    hidden, head = torch.tensor([[1e4]]), torch.tensor([[1e-4], [-2e-4], [2.0], [0.0]])
    target = torch.tensor([2])
    loss = linear_squentropy(hidden, head, target, implementation=implementation)
    torch.testing.assert_close(loss, torch.tensor((1.0 + 4.0) / 3))


@pytest.mark.untyped
def test_linear_form_of_one_class() -> None:
    target = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="linear_squentropy: linear_weight must be of at least 2"):
        linear_squentropy(torch.zeros(2, 3), torch.zeros(1, 3), target)
