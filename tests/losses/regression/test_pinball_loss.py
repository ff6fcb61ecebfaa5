"""The pinball loss, against scikit-learn's and rectifiers."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mean_pinball_loss
from torch import Tensor

from tilework.losses import pinball_loss

import samples
from losses.regression.quantiles import quantiles
from losses.samples import Loss


def definition(
    input: Tensor, target: Tensor, quantile_levels: Tensor, *, reduction: str = "mean"
) -> Tensor:
    gap = target.unsqueeze(-1) - input
    losses = quantile_levels * gap.relu() + (1 - quantile_levels) * (-gap).relu()
    return losses if reduction == "none" else getattr(losses, reduction)()


REFUSED: samples.Refusals = (
    (r"input must be of shape \(\.\.\., K\), K >= 1", ValueError, {"input": torch.ones(())}),
    (r"input must be of shape \(\.\.\., K\), K >= 1", ValueError, {"input": torch.ones(4, 0)}),
    (r"target must be of shape \(4,\)", ValueError, {"target": torch.ones(4, 1)}),
    (
        r"quantile_levels must be of shape \(2,\)",
        ValueError,
        {"quantile_levels": torch.tensor([0.5])},
    ),
    (
        "quantile_levels must not require",
        ValueError,
        {"quantile_levels": torch.tensor([0.2, 0.5], requires_grad=True)},
    ),
    *(
        (
            "quantile_levels must be above 0, below 1 and strictly increasing, got",
            ValueError,
            {"quantile_levels": torch.tensor(levels)},
        )
        for levels in ([0.0, 0.5], [0.5, 1.0], [0.5, 0.5], [0.6, 0.5], [0.5, torch.nan])
    ),
)


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            pinball_loss,
            definition,
            None,
            partial(quantiles, *shape),
            differentiable=("input", "target"),
            class_index=False,
            accepts={
                "input": torch.zeros(4, 2),
                "target": torch.zeros(4),
                "quantile_levels": torch.tensor([0.2, 0.5]),
            },
            refuses=refuses,
        )
        for shape, refuses in (((13,), REFUSED), ((3, 2), ()))
    ]


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 10**6))
def test_equals_scikit_learns(levels: int, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = quantiles(count, levels=levels)
    losses = pinball_loss(**tensors, reduction="none")
    input, target, quantile_levels = (tensor.numpy() for tensor in tensors.values())
    expected = [
        mean_pinball_loss(target, input[:, k], alpha=level)
        for k, level in enumerate(quantile_levels)
    ]
    np.testing.assert_allclose(losses.mean(0).numpy(), expected, rtol=1e-12)


def test_at_one_half_is_half_the_absolute_error() -> None:
    input, target = torch.randn(9, 1), torch.randn(9)
    losses = pinball_loss(input, target, torch.tensor([0.5]), reduction="none")
    torch.testing.assert_close(losses, (input - target[:, None]).abs() / 2)


def test_is_least_at_the_quantiles_of_the_target() -> None:
    target = torch.randn(101).double().sort().values
    levels = torch.tensor([0.1, 0.5, 0.9]).double()
    best = torch.quantile(target, levels)
    candidates = target[:, None, None].expand(-1, 101, 3)
    losses = pinball_loss(candidates, target.expand(101, -1), levels, reduction="none").mean(1)
    at_best = pinball_loss(best.expand(101, 3), target, levels, reduction="none").mean(0)
    torch.testing.assert_close(losses.amin(0), at_best)


def test_gradient_is_0_where_the_quantile_is_met() -> None:
    input = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    target = torch.tensor([2.0], requires_grad=True)
    pinball_loss(input, target, torch.tensor([0.25, 0.5, 0.75]), reduction="sum").backward()
    assert input.grad is not None
    assert input.grad.tolist() == [[-0.25, 0.0, 0.25]]
    assert target.grad is not None
    assert target.grad.item() == 0


def test_target_of_another_dtype() -> None:
    input, levels = torch.randn(5, 2).bfloat16(), torch.tensor([0.25, 0.75])
    target = torch.randn(5).double()
    actual = pinball_loss(input, target, levels)
    assert actual.dtype == torch.bfloat16
    assert actual == pinball_loss(input.double(), target, levels.double()).bfloat16()
    near = torch.tensor([1e8 + 1], dtype=torch.float64)  # 1e8 in float32
    assert pinball_loss(torch.tensor([[1e8]]), near, torch.tensor([0.5])) == 0.5


@pytest.mark.untyped
def test_levels_that_cannot_be_read_give_nan() -> None:
    input, target = torch.randn(1, 4, 2), torch.randn(1, 4)
    score = torch.func.vmap(pinball_loss, in_dims=(0, 0, 0))
    for levels in ([0.5, 0.5], [0.0, 0.5], [0.5, 1.0], [0.7, 0.6]):
        assert score(input, target, torch.tensor([levels])).isnan()
    assert score(input, target, torch.tensor([[0.5, 0.6]])).isfinite()
