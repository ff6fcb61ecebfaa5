"""The weighted interval score, against intervals and their misses."""

from functools import partial

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.losses import weighted_interval_score

import samples
from losses.regression.quantiles import quantiles
from losses.samples import Loss


def definition(
    input: Tensor, target: Tensor, quantile_levels: Tensor, *, reduction: str = "mean"
) -> Tensor:
    count = input.shape[-1]
    scores = torch.zeros_like(target)
    for k in range(count):
        gap = target - input[..., k]
        scores = scores + 2 / count * quantile_levels[k] * gap.relu()
        scores = scores + 2 / count * (1 - quantile_levels[k]) * (-gap).relu()
    return scores if reduction == "none" else getattr(scores, reduction)()


REFUSED: samples.Refusals = (
    (r"input must be of shape \(\.\.\., K\)", ValueError, {"input": torch.ones(())}),
    (r"target must be of shape \(4,\)", ValueError, {"target": torch.ones(4, 1)}),
    (r"quantile_levels must be of shape", ValueError, {"quantile_levels": torch.tensor([0.5])}),
    ("quantile_levels must be above 0", ValueError, {"quantile_levels": torch.tensor([0.5, 1.0])}),
)


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            weighted_interval_score,
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


@given(st.integers(1, 6), st.integers(0, 10**6))
def test_equals_widths_and_misses_of_intervals(intervals: int, seed: int) -> None:
    """The score of forecasts: an interval for each alpha, and the median with weight one half."""
    torch.manual_seed(seed)
    alphas = (torch.rand(intervals).double() * 0.9 + 0.05).sort().values.unique()
    levels = torch.cat([alphas / 2, torch.tensor([0.5]).double(), 1 - alphas.flip(0) / 2])
    input, target = torch.randn(7, len(levels)).double().sort(-1).values, torch.randn(7).double()
    expected = (target - input[:, len(alphas)]).abs() / 2
    for k, alpha in enumerate(alphas):
        lower, upper = input[:, k], input[:, len(levels) - 1 - k]
        score = upper - lower
        score = score + 2 / alpha * (lower - target).clamp(min=0)
        score = score + 2 / alpha * (target - upper).clamp(min=0)
        expected = expected + alpha / 2 * score
    expected = expected / (len(alphas) + 0.5)
    actual = weighted_interval_score(input, target, levels, reduction="none")
    torch.testing.assert_close(actual, expected)
