"""The penalty on crossing quantiles, against loops."""

import math
from functools import partial

import torch
from torch import Tensor

from tilework.losses import quantile_crossing_penalty

import samples
from losses.samples import Arguments, Loss


def definition(input: Tensor, *, margin: float = 0.0, reduction: str = "mean") -> Tensor:
    losses = torch.zeros_like(input[..., 0])
    for k in range(input.shape[-1] - 1):
        losses = losses + (input[..., k] - input[..., k + 1] + margin).relu()
    return losses if reduction == "none" else getattr(losses, reduction)()


def draw(*shape: int) -> Arguments:
    return {"input": torch.randn(shape, dtype=torch.float64)}


REFUSED: samples.Refusals = (
    ("input must be of shape", ValueError, {"input": torch.zeros(())}),
    ("input must be of shape", ValueError, {"input": torch.zeros(4, 0)}),
    ("margin must be a finite", ValueError, {"margin": -0.1}),
    ("margin must be a finite", ValueError, {"margin": math.inf}),
    ("margin must be a number", TypeError, {"margin": "1"}),
)


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            quantile_crossing_penalty,
            definition,
            None,
            partial(draw, *shape),
            options=({}, {"margin": 0.3}),
            batched=("input",),
            class_index=False,
            accepts={"input": torch.zeros(2, 3)},
            refuses=refuses,
        )
        for shape, refuses in (((13, 5), REFUSED), ((3, 2, 4), ()))
    ]


def test_is_0_for_increasing_quantiles() -> None:
    input = torch.randn(9, 7).sort(-1).values
    assert quantile_crossing_penalty(input) == 0
    assert quantile_crossing_penalty(input * 1e4, margin=1e-3) == 0
    assert quantile_crossing_penalty(input.flip(-1)) > 0


def test_of_one_level() -> None:
    penalties = quantile_crossing_penalty(torch.randn(3, 1), margin=1.0, reduction="none")
    assert penalties.tolist() == [0, 0, 0]
