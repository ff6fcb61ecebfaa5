"""The penalty on crossing quantiles, against loops."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from tilework.losses import quantile_crossing_penalty

from losses.samples import Arguments, Sample


def definition(input: Tensor, *, margin: float = 0.0, reduction: str = "mean") -> Tensor:
    losses = torch.zeros_like(input[..., 0])
    for k in range(input.shape[-1] - 1):
        losses = losses + (input[..., k] - input[..., k + 1] + margin).relu()
    return losses if reduction == "none" else getattr(losses, reduction)()


def draw(*shape: int) -> Arguments:
    return {"input": torch.randn(shape, dtype=torch.float64)}


SAMPLES = [
    Sample(
        quantile_crossing_penalty,
        definition,
        None,
        partial(draw, *shape),
        options=({}, {"margin": 0.3}),
        batched=("input",),
        class_index=False,
    )
    for shape in ((13, 5), (3, 2, 4))
]


def test_is_0_for_increasing_quantiles() -> None:
    input = torch.randn(9, 7).sort(-1).values
    assert quantile_crossing_penalty(input) == 0
    assert quantile_crossing_penalty(input * 1e4, margin=1e-3) == 0
    assert quantile_crossing_penalty(input.flip(-1)) > 0


def test_of_one_level() -> None:
    penalties = quantile_crossing_penalty(torch.randn(3, 1), margin=1.0, reduction="none")
    assert penalties.tolist() == [0, 0, 0]


@pytest.mark.untyped
def test_bad_input() -> None:
    for shape in ((), (4, 0)):
        with pytest.raises(ValueError, match="quantile_crossing_penalty: input must be of shape"):
            quantile_crossing_penalty(torch.zeros(shape))
    for margin in (-0.1, math.inf):
        with pytest.raises(ValueError, match="quantile_crossing_penalty: margin must be a finite"):
            quantile_crossing_penalty(torch.zeros(2, 3), margin=margin)
    with pytest.raises(TypeError, match="quantile_crossing_penalty: margin must be a number"):
        quantile_crossing_penalty(torch.zeros(2, 3), margin="1")  # type: ignore[arg-type]
