"""Weights from running losses of classes, against loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.losses import DynamicLossSizeWeighting

from helpers import FLOATING, assert_exact, dtype_name


def by_loops(
    calls: list[Tensor], classes: int, smoothing: float, eps: float
) -> tuple[list[float], list[float], float]:
    """The running losses, the weights and the result of the last call."""
    running = [1 / classes] * classes
    for losses in calls:
        rows = losses.tolist()
        for c in range(classes):
            mean = math.fsum(row[c] for row in rows) / len(rows)
            running[c] = smoothing * mean + (1 - smoothing) * running[c]
    inverse = [1 / (eps + value) for value in running]
    weights = [value / sum(inverse) for value in inverse]
    products = [weights[c] * row[c] for row in rows for c in range(classes)]
    return running, weights, math.fsum(products) / len(products)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("options", [{}, {"smoothing": 0.4, "eps": 0.2}, {"smoothing": 1.0}])
def test_equals_loops(options: dict[str, Any], dtype: torch.dtype) -> None:
    weighting = DynamicLossSizeWeighting(4, **options).double()
    calls = [torch.rand(n, 4).to(dtype) for n in (7, 1, 63)]
    calls[-1].requires_grad_()
    before = [losses.detach().clone() for losses in calls]
    result = [weighting(losses) for losses in calls][-1]
    assert result.dtype == dtype
    assert all(torch.equal(losses, old) for losses, old in zip(calls, before, strict=True))
    running, weights, expected = by_loops(
        [losses.double() for losses in calls], 4, **({"smoothing": 0.1, "eps": 1e-5} | options)
    )
    torch.testing.assert_close(weighting.class_loss, torch.tensor(running, dtype=torch.float64))
    exact = torch.tensor(expected, dtype=torch.float64)
    single = torch.float32 if dtype == torch.float64 else dtype
    chain = torch.full((4,), 0.25)
    for losses in calls:
        means = losses.detach().float().mean(0)
        chain = weighting.smoothing * means + (1 - weighting.smoothing) * chain
    inverse = 1 / (weighting.eps + chain)
    composed = ((inverse / inverse.sum()).to(single) * calls[-1].to(single)).mean()
    assert_exact(result, composed, exact, dtype)
    (gradient,) = torch.autograd.grad(result, calls[-1])
    spread = (torch.tensor(weights, dtype=torch.float64) / (63 * 4)).expand(63, 4)
    assert_exact(gradient, spread.to(single), spread, dtype)


def test_evaluation_leaves_the_running_losses() -> None:
    weighting = DynamicLossSizeWeighting(3)
    assert weighting.class_loss.tolist() == pytest.approx([1 / 3] * 3)
    weighting(torch.rand(5, 3))
    running = weighting.class_loss.clone()
    weighting.eval()
    losses = torch.rand(5, 3)
    inverse = 1 / (1e-5 + running)
    expected = (inverse / inverse.sum() * losses).mean()
    torch.testing.assert_close(weighting(losses), expected)
    assert torch.equal(weighting.class_loss, running)


def test_constant_losses_level_out() -> None:
    """The weights become proportional to 1 / (eps + loss), so that contributions are equal."""
    weighting = DynamicLossSizeWeighting(3, smoothing=0.5)
    losses = torch.tensor([[0.5, 1.0, 4.0]], requires_grad=True)
    for _ in range(60):
        result = weighting(losses)
    (gradient,) = torch.autograd.grad(result, losses)
    contributions = (gradient * (losses.detach() + 1e-5)).flatten()
    torch.testing.assert_close(contributions, contributions[:1].expand(3))
    assert (gradient > 0).all()
    assert (3 * gradient).sum().item() == pytest.approx(1)


def test_nothing_and_nan() -> None:
    weighting = DynamicLossSizeWeighting(3)
    assert weighting(torch.zeros(0, 3)).isnan()
    assert torch.equal(weighting.class_loss, torch.full((3,), 1 / 3))
    assert weighting(torch.full((2, 3), torch.nan)).isnan()


def test_resumes() -> None:
    first, second = DynamicLossSizeWeighting(3), DynamicLossSizeWeighting(3)
    first(torch.rand(5, 3))
    second.load_state_dict(first.state_dict())
    assert list(first.state_dict()) == ["class_loss"]
    losses = torch.rand(4, 3)
    assert torch.equal(first(losses), second(losses))
    assert torch.equal(first.class_loss, second.class_loss)
    assert repr(DynamicLossSizeWeighting(3, eps=0.1)) == (
        "DynamicLossSizeWeighting(num_classes=3, eps=0.1)"
    )


@pytest.mark.untyped
def test_compiles_and_autocasts() -> None:
    ours, compiled = DynamicLossSizeWeighting(3), DynamicLossSizeWeighting(3)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        losses = torch.rand(5, 3, requires_grad=True)
        torch.testing.assert_close(run(losses), ours(losses))
    torch.testing.assert_close(compiled.class_loss, ours.class_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(torch.rand(5, 3).bfloat16()).dtype == torch.float32


@pytest.mark.untyped
def test_bad_input() -> None:
    name = "DynamicLossSizeWeighting"
    for smoothing in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"{name}: smoothing must be a"):
            DynamicLossSizeWeighting(3, smoothing=smoothing)
    with pytest.raises(ValueError, match=f"{name}: eps must be a finite number above 0"):
        DynamicLossSizeWeighting(3, eps=0.0)
    with pytest.raises(ValueError, match=f"{name}: num_classes must be an int of at least 1"):
        DynamicLossSizeWeighting(0)
    with pytest.raises(TypeError, match=f"{name}: num_classes must be an int"):
        DynamicLossSizeWeighting(3.0)  # type: ignore[arg-type]
    for shape in ((3,), (5, 4), (5, 3, 1)):
        with pytest.raises(ValueError, match=rf"{name}: loss_per_element must be of shape \(N"):
            DynamicLossSizeWeighting(3)(torch.zeros(shape))
    with pytest.raises(TypeError, match=f"{name}: loss_per_element must be a floating-point"):
        DynamicLossSizeWeighting(3)(torch.zeros(5, 3).int())
