"""The multi-label focal loss, against torch's binary cross-entropy and probabilities."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.losses import MultilabelFocalLoss, multilabel_focal_loss

import samples
from helpers import assert_exact
from losses.samples import Arguments, Loss


def definition(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    gamma: float = 2.0,
    reduction: str = "mean",
) -> Tensor:
    entropy = -target * F.logsigmoid(input) - (1 - target) * F.logsigmoid(-input)
    losses = alpha * (1 - torch.exp(-entropy)) ** gamma * entropy
    return losses if reduction == "none" else getattr(losses, reduction)()


def soft(*shape: int) -> Arguments:
    return {
        "input": 2 * torch.randn(shape, dtype=torch.float64),
        "target": torch.rand(shape, dtype=torch.float64),
    }


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            multilabel_focal_loss,
            definition,
            MultilabelFocalLoss,
            lambda: soft(13, 4),
            options=({}, {"alpha": 0.3, "gamma": 0.0}, {"alpha": 0.3, "gamma": 1.5}),
            differentiable=("input", "target"),
            class_index=False,
            accepts={"input": torch.zeros(4, 3), "target": torch.zeros(4, 3)},
            refuses=(
                ("gamma must be a finite number of at least 0", ValueError, {"gamma": -1.0}),
                ("gamma must be a finite number of at least 0", ValueError, {"gamma": math.inf}),
                ("alpha must be a finite number of at least 0", ValueError, {"alpha": -1.0}),
                ("alpha must be a number", TypeError, {"alpha": "1"}),
                (r"target must be of shape \(4, 3\)", ValueError, {"target": torch.zeros(4, 1)}),
                (
                    "target must be from 0 to 1 everywhere, got 1.5",
                    ValueError,
                    {"target": torch.full((4, 3), 1.5)},
                ),
                (
                    "target must be from 0 to 1 everywhere, got -0.5",
                    ValueError,
                    {"target": torch.full((4, 3), -0.5)},
                ),
            ),
        ),
        Loss(
            multilabel_focal_loss,
            definition,
            MultilabelFocalLoss,
            lambda: soft(7) | {"target": torch.randint(2, (7,)).double()},
            class_index=False,
        ),
    ]


@given(st.floats(0, 5), st.floats(0, 3), st.integers(0, 10**6))
def test_of_hard_labels(gamma: float, alpha: float, seed: int) -> None:
    """The usual focal loss: (1 - p)^gamma times -log p, of the true label's probability p."""
    torch.manual_seed(seed)
    input = torch.randn(5, 3, dtype=torch.float64)
    target = torch.randint(2, (5, 3)).double()
    probability = torch.where(target == 1, input.sigmoid(), 1 - input.sigmoid())
    expected = alpha * (1 - probability) ** gamma * -probability.log()
    actual = multilabel_focal_loss(input, target, alpha=alpha, gamma=gamma, reduction="none")
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_without_focus_is_binary_cross_entropy(reduction: str) -> None:
    input, target = soft(9, 4).values()
    actual = multilabel_focal_loss(input, target, gamma=0.0, reduction=reduction)
    expected = F.binary_cross_entropy_with_logits(input, target, reduction=reduction)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits(dtype: torch.dtype, gamma: float) -> None:
    """Values and gradients are those of float64, also where the entropy is 0 in float32."""
    input = torch.tensor([1e4, -1e4, 1e4, -1e4, 30, -30, 200, -200, 0]).to(dtype).requires_grad_()
    target = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 1]).to(dtype)
    exact = input.detach().double().requires_grad_()
    results = (
        multilabel_focal_loss(input, target, gamma=gamma, reduction="none"),
        definition(exact, target.double(), gamma=gamma, reduction="none"),
    )
    assert_exact(results[0], results[1].to(dtype), results[1].to(dtype).double(), dtype)
    (actual,) = torch.autograd.grad(results[0].sum(), input)
    # In closed form, as the definition's derivative is nan for entropies of 0.
    entropy = results[1].new_tensor(
        F.binary_cross_entropy_with_logits(exact, target.double(), reduction="none").tolist()
    )
    missed = -torch.expm1(-entropy)
    slope = missed**gamma + gamma * (1 - missed) * entropy * missed.clamp(min=1e-300) ** (gamma - 1)
    expected = (exact.sigmoid() - target.double()).detach() * slope
    # sigmoid - target is 0 in float32 where it is below the last place of 1.
    torch.testing.assert_close(
        actual.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2**-24
    )


@pytest.mark.untyped
def test_targets_that_cannot_be_read_give_nan() -> None:
    input, target = torch.zeros(1, 3), torch.tensor([[0.5, 1.5, -0.5]])
    losses = torch.func.vmap(lambda a, b: multilabel_focal_loss(a, b, reduction="none"))(
        input, target
    )
    assert losses.isnan().tolist() == [[False, True, True]]
