"""Loss-based weights and sums, against loops and against one process."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.losses import LossBasedReweighting, loss_based_reweighting, loss_based_weights

import processes
import samples
from calls import Call, draw
from helpers import FLOATING, assert_exact, dtype_name
from losses.samples import Loss

STRATEGIES = ("linupper", "quadratic", "extremes", "uniform")


def weights(
    losses: Tensor, strategy: str = "linupper", delta: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """In terms of the middle and half of the range."""
    least, largest = losses.detach().min(), losses.detach().max()
    middle, half = (least + largest) / 2, (largest - least) / 2
    distance = (losses.detach() - middle) / torch.clamp(half, min=0.5e-6)
    score = {
        "linupper": delta * torch.where(distance < 0, 1 + distance, 1),
        "quadratic": 1 - distance**2,
        "extremes": delta * distance.abs(),
        "uniform": torch.zeros_like(distance),
    }[strategy]
    return torch.softmax(score / temperature, 0)


def definition(losses: Tensor, **options: Any) -> Tensor:
    return (weights(losses, **options) * losses).sum()


OPTIONS = tuple({"strategy": s, "delta": 0.7, "temperature": 0.3} for s in STRATEGIES)
REFUSED: samples.Refusals = (
    ("strategy must be one of 'linupper'", ValueError, {"strategy": "upper"}),
    ("delta must be a finite number above 0", ValueError, {"delta": 0.0}),
    ("temperature must be a finite number above 0", ValueError, {"temperature": -1.0}),
    ("temperature must be a number", TypeError, {"temperature": "1"}),
    (r"losses must be of shape \(B\), B >= 1", ValueError, {"losses": torch.zeros(2, 2)}),
    (r"losses must be of shape \(B\), B >= 1", ValueError, {"losses": torch.zeros(())}),
    (r"losses must be of shape \(B\), B >= 1", ValueError, {"losses": torch.zeros(0)}),
    ("losses must be a floating-point tensor", TypeError, {"losses": torch.zeros(2).int()}),
)


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            loss_based_reweighting,
            definition,
            LossBasedReweighting,
            lambda: {"losses": torch.rand(13, dtype=torch.float64) * 5},
            options=({}, *OPTIONS),
            differentiable=("losses",),
            batched=(),
            class_index=False,
            surrogate=True,
            accepts={"losses": torch.zeros(3)},
            refuses=REFUSED,
        )
    ]


every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("count", [1, 2, 7, 63, 100])
@every_strategy
def test_weights_equal_their_definition(strategy: str, count: int, dtype: torch.dtype) -> None:
    losses = (5 * torch.rand(count)).to(dtype).requires_grad_()
    options = {"strategy": strategy, "delta": 1.5, "temperature": 0.4}
    actual = loss_based_weights(losses, **options)
    assert actual.dtype == dtype
    assert not actual.requires_grad
    single = torch.float32 if dtype == torch.float64 else dtype
    composed = weights(losses.to(single), **options)
    assert_exact(actual, composed, weights(losses.double(), **options), dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = dtype in (torch.bfloat16, torch.float16)
        assert loss_based_weights(losses).dtype == (torch.float32 if half else dtype)


def test_three_losses_by_hand() -> None:
    """Scores 0, 1, 1 of linupper; 0, 1, 0 of quadratic; 1, 0, 1 of extremes."""
    losses = torch.tensor([1.0, 2.0, 3.0]).double()
    e = math.e
    for strategy, scores in (
        ("linupper", (1, e, e)),
        ("quadratic", (1, e, 1)),
        ("extremes", (e, 1, e)),
        ("uniform", (1, 1, 1)),
    ):
        expected = torch.tensor(scores).double() / sum(scores)
        torch.testing.assert_close(loss_based_weights(losses, strategy=strategy), expected)


@given(
    st.sampled_from(STRATEGIES),
    st.integers(1, 20),
    st.floats(0.1, 10),
    st.floats(-100, 100),
    st.integers(0, 10**6),
)
def test_properties(strategy: str, count: int, scale: float, shift: float, seed: int) -> None:
    torch.manual_seed(seed)
    losses = torch.rand(count, dtype=torch.float64)
    actual = loss_based_weights(losses, strategy=strategy)
    assert (actual > 0).all()
    assert actual.sum().item() == pytest.approx(1)
    moved = loss_based_weights(scale * losses + shift, strategy=strategy)
    torch.testing.assert_close(moved, actual, rtol=1e-6, atol=1e-9)
    hot = loss_based_reweighting(losses, strategy=strategy, temperature=1e9)
    torch.testing.assert_close(hot, losses.mean())
    same = loss_based_weights(torch.full((count,), shift), strategy=strategy)
    torch.testing.assert_close(same, torch.full((count,), 1 / count))


def test_linupper_rises_and_is_flat_above_the_middle() -> None:
    losses = torch.linspace(2, 4, 21, dtype=torch.float64)
    actual = loss_based_weights(losses)
    assert (actual[:10].diff() > 0).all()
    torch.testing.assert_close(actual[10:], actual[10:11].expand(11))


def test_nearly_equal_losses_keep_their_weights() -> None:
    """A range below 1e-6 does not blow up: all scores are nearly that of the middle."""
    losses = 3 + torch.tensor([0, 1e-9, 3e-9]).double()
    torch.testing.assert_close(
        loss_based_weights(losses), torch.full((3,), 1 / 3).double(), rtol=2e-3, atol=0
    )


def test_gradient_is_the_weight() -> None:
    losses = torch.rand(9, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_based_reweighting(losses), losses)
    assert torch.equal(gradient, loss_based_weights(losses))


def test_temperature_may_change() -> None:
    criterion = LossBasedReweighting(temperature=2.0)
    losses = torch.rand(9)
    criterion.temperature = 0.1
    assert criterion(losses) == loss_based_reweighting(losses, temperature=0.1)
    criterion.temperature = 0.0
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        criterion(losses)


def in_group() -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    losses = problem()[3 * rank : 3 * rank + 3].requires_grad_()
    total = LossBasedReweighting(strategy="quadratic", group=dist.group.WORLD)(losses)
    total.backward()
    assert losses.grad is not None
    return total.detach(), losses.grad


def problem() -> Tensor:
    return torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_group_equals_one_process() -> None:
    results = processes.run(in_group, 2)
    losses = problem().requires_grad_()
    total = loss_based_reweighting(losses, strategy="quadratic")
    total.backward()
    assert losses.grad is not None
    torch.testing.assert_close((results[0][0] + results[1][0]) / 2, total.detach())
    # Averaged over the processes, as data parallelism does.
    torch.testing.assert_close(torch.cat([gradient for _, gradient in results]) / 2, losses.grad)


@pytest.mark.untyped
@pytest.mark.parametrize(("message", "error", "change"), REFUSED)
def test_weights_refuse(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^loss_based_weights: {message}"):
        loss_based_weights(**({"losses": torch.zeros(3)} | change))


@pytest.mark.untyped
def test_bad_group() -> None:
    with pytest.raises(TypeError, match="loss_based_reweighting: group must be a process group"):
        LossBasedReweighting(group="group")
    with pytest.raises(TypeError, match="loss_based_reweighting: group must be a process group"):
        loss_based_reweighting(torch.ones(2), group="group")


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            loss_based_weights,
            lambda: {"losses": draw(7)},
            options=({}, {"strategy": "extremes"}),
        ),
    ]
