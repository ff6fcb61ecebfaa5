"""HL-Gauss, against scipy's normal distribution and torch's cross-entropy."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.losses import HLGaussLoss, hl_gauss_loss, hl_gauss_targets

import samples
from calls import Call
from helpers import FLOATING, assert_exact, dtype_name
from losses.samples import Arguments, Loss

RANGE: dict[str, Any] = {"min_value": -2.0, "max_value": 3.0}


def definition(
    input: Tensor,
    target: Tensor,
    *,
    min_value: float,
    max_value: float,
    sigma: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    bins = input.shape[-1]
    edges = torch.linspace(min_value, max_value, bins + 1, dtype=input.dtype)
    sigma = 0.75 * (max_value - min_value) / bins if sigma is None else sigma
    target = target.detach().clamp(min_value, max_value)
    below = 0.5 * (1 + torch.erf((edges - target[..., None]) / (sigma * math.sqrt(2))))
    p = below.diff(dim=-1) / (below[..., -1:] - below[..., :1])
    losses = -(p * F.log_softmax(input, -1)).sum(-1)
    return losses if reduction == "none" else getattr(losses, reduction)()


def draw(*shape: int) -> Arguments:
    """Logits, and values of which some lie outside."""
    return {
        "input": 2 * torch.randn(shape, dtype=torch.float64),
        "target": 2.5 * torch.randn(shape[:-1], dtype=torch.float64),
    }


def on_range(function: Callable[..., Any]) -> Any:
    """A function with its range as default, under its own name."""
    partial = functools.partial(function, **RANGE)
    partial.__name__ = function.__name__  # type: ignore[attr-defined]
    return partial


REFUSED: samples.Refusals = (
    ("max_value must be above min_value=3.0, got 3.0", ValueError, {"min_value": 3.0}),
    ("max_value must be above min_value=-2.0, got -2.5", ValueError, {"max_value": -2.5}),
    ("min_value must be a finite number", ValueError, {"min_value": -math.inf}),
    ("max_value must be a finite number", ValueError, {"max_value": math.nan}),
    ("min_value must be a number", TypeError, {"min_value": "0"}),
    ("sigma must be a finite number above 0", ValueError, {"sigma": 0.0}),
    ("sigma must be a number", TypeError, {"sigma": "1"}),
)


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            on_range(hl_gauss_loss),
            on_range(definition),
            functools.partial(HLGaussLoss, **RANGE, num_bins=11),
            lambda: draw(6, 2, 11),
            options=({}, {"sigma": 0.3}),
            class_index=False,
            accepts={"input": torch.zeros(4, 3), "target": torch.zeros(4)},
            refuses=(
                *REFUSED,
                ("input must be of shape", ValueError, {"input": torch.zeros(4, 1)}),
                ("input must be of shape", ValueError, {"input": torch.zeros(())}),
                ("target must be of shape", ValueError, {"target": torch.zeros(4, 3)}),
            ),
        ),
    ]


@pytest.mark.parametrize("sigma", [None, 0.05, 0.6, 40.0])
@pytest.mark.parametrize("bins", [2, 7, 100])
def test_targets_equal_scipy(bins: int, sigma: float | None) -> None:
    target = draw(63, 1)["target"]
    target[:3] = torch.tensor([-2.0, 3.0, 0.5])
    actual = hl_gauss_targets(target, **RANGE, num_bins=bins, sigma=sigma)
    edges = np.linspace(-2, 3, bins + 1)
    scale = 0.75 * 5 / bins if sigma is None else sigma
    for y, row in zip(target.clamp(-2, 3).tolist(), actual, strict=True):
        below = scipy.stats.norm.cdf(edges, y, scale)
        torch.testing.assert_close(row.numpy(), np.diff(below) / (below[-1] - below[0]))


def test_targets_equal_an_integral() -> None:
    density = scipy.stats.norm(0.7, 0.4).pdf
    edges = np.linspace(-2, 3, 5)
    masses = [scipy.integrate.quad(density, *edges[k : k + 2])[0] for k in range(4)]
    actual = hl_gauss_targets(torch.tensor(0.7).double(), **RANGE, num_bins=4, sigma=0.4)
    torch.testing.assert_close(actual.numpy(), np.array(masses) / sum(masses))


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("shape", [(), (1,), (63, 2), (0, 3)])
def test_targets_in_every_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    target = draw(*shape, 1)["target"].to(dtype)

    def composed(other: torch.dtype) -> Tensor:
        values = target.to(other).clamp(-2, 3)[..., None]
        edges = torch.linspace(-2, 3, 101, dtype=other)
        below = torch.special.ndtr((edges - values).to(torch.float64) / 0.05).to(other)
        return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])

    actual = hl_gauss_targets(target, **RANGE, num_bins=100, sigma=0.05)
    assert actual.shape == (*shape, 100)
    assert actual.dtype == dtype
    # In single precision also for half, which is rounded once.
    assert_exact(actual, composed(torch.float32), composed(torch.float64), dtype)


@given(st.floats(-4, 5), st.integers(2, 63), st.floats(0.01, 20))
def test_targets_are_probabilities(value: float, bins: int, sigma: float) -> None:
    row = hl_gauss_targets(
        torch.tensor(value, dtype=torch.float64), **RANGE, num_bins=bins, sigma=sigma
    )
    assert (row >= 0).all()
    torch.testing.assert_close(row.sum().item(), 1.0)


@given(st.floats(-2, 3), st.integers(2, 63))
def test_mean_is_within_a_bin(value: float, bins: int) -> None:
    width = 5 / bins
    criterion = HLGaussLoss(-2.0, 3.0, bins)
    row = criterion.targets(torch.tensor(value, dtype=torch.float64))
    assert abs(criterion.value(row.log()).item() - value) <= width


@given(st.floats(-0.5, 0.5))
def test_a_bin_further(value: float) -> None:
    target = torch.tensor([value, value + 0.1], dtype=torch.float64)
    first, second = hl_gauss_targets(target, **RANGE, num_bins=50)
    torch.testing.assert_close(first[:-1], second[1:], rtol=0, atol=1e-12)


def test_a_narrow_gaussian_is_a_bin() -> None:
    target = torch.tensor([-2.0, -1.2, 0.6, 2.9, 3.0])
    rows = hl_gauss_targets(target, **RANGE, num_bins=5, sigma=1e-6)
    assert torch.equal(rows, F.one_hot(torch.tensor([0, 0, 2, 4, 4]), 5).float())
    on_an_edge = hl_gauss_targets(torch.tensor(0.0), **RANGE, num_bins=5, sigma=1e-6)
    assert on_an_edge.tolist() == [0.0, 0.5, 0.5, 0.0, 0.0]


def test_a_wide_gaussian_is_uniform() -> None:
    rows = hl_gauss_targets(draw(7, 1)["target"].float(), **RANGE, num_bins=7, sigma=1e6)
    torch.testing.assert_close(rows, torch.full((7, 7), 1 / 7))


def test_values_outside_count_as_the_ends() -> None:
    far = hl_gauss_targets(torch.tensor([-9.0, 1e30, torch.inf]), **RANGE, num_bins=7)
    ends = hl_gauss_targets(torch.tensor([-2.0, 3.0, 3.0]), **RANGE, num_bins=7)
    assert torch.equal(far, ends)
    assert hl_gauss_targets(torch.tensor(torch.nan), **RANGE, num_bins=7).isnan().all()


def test_gradient_is_softmax_minus_targets() -> None:
    tensors = draw(5, 7)
    input, target = tensors["input"].requires_grad_(), tensors["target"].requires_grad_()
    loss = hl_gauss_loss(input, target, **RANGE, reduction="sum")
    assert torch.autograd.grad(loss, target, allow_unused=True, retain_graph=True) == (None,)
    (gradient,) = torch.autograd.grad(loss, input)
    targets = hl_gauss_targets(target, **RANGE, num_bins=7)
    assert not targets.requires_grad
    torch.testing.assert_close(gradient, input.detach().softmax(-1) - targets)


def test_equals_cross_entropy_with_the_targets() -> None:
    input, target = draw(5, 7).values()
    p = hl_gauss_targets(target, **RANGE, num_bins=7, sigma=0.4)
    for reduction in ("none", "sum", "mean"):
        torch.testing.assert_close(
            hl_gauss_loss(input, target, **RANGE, sigma=0.4, reduction=reduction),
            F.cross_entropy(input, p, reduction=reduction),
        )


def test_values_keep_their_precision_beside_other_logits() -> None:
    """Targets are in float32 where logits are half, and in float64 where the target is."""
    input, target = draw(5, 100).values()
    half = input.half()
    expected = definition(half.double(), target, **RANGE).float()
    with torch.autocast("cpu", dtype=torch.float16):
        actual = hl_gauss_loss(half, target, **RANGE)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    single = definition(input, target.float().double(), **RANGE)
    actual = hl_gauss_loss(input, target.float(), **RANGE)
    torch.testing.assert_close(actual, single, rtol=1e-12, atol=0)


def test_module_encodes_and_decodes() -> None:
    criterion = HLGaussLoss(-2.0, 3.0, 7, sigma=0.4, reduction="sum")
    assert repr(criterion) == (
        "HLGaussLoss(min_value=-2.0, max_value=3.0, num_bins=7, sigma=0.4, reduction='sum')"
    )
    input, target = draw(5, 7).values()
    targets = hl_gauss_targets(target, **RANGE, num_bins=7, sigma=0.4)
    assert torch.equal(criterion.targets(target), targets)
    centers = torch.linspace(-2, 3, 15, dtype=torch.float64)[1::2]
    torch.testing.assert_close(criterion.value(input), input.softmax(-1) @ centers)
    for call in (criterion.value, lambda wrong: criterion(wrong, target)):
        with pytest.raises(ValueError, match=r"hl_gauss_loss: input must be of shape \(\.\.\., 7"):
            call(input[:, :6])
        with pytest.raises(TypeError, match="hl_gauss_loss: input must be a floating"):
            call(input.long())


@pytest.mark.untyped
def test_targets_under_transforms() -> None:
    target = draw(5, 3, 1)["target"]
    encode = functools.partial(hl_gauss_targets, **RANGE, num_bins=7)
    expected = encode(target)
    torch.testing.assert_close(torch.func.vmap(encode)(target), expected)
    compiled = torch.compile(encode, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(target), expected)
    torch.testing.assert_close(encode(target.T), expected.movedim(0, 1))


REFUSED_BINS: samples.Refusals = (
    ("num_bins must be an int of at least 2, got 1", ValueError, {"num_bins": 1}),
    ("num_bins must be an int", TypeError, {"num_bins": 5.0}),
)


@pytest.mark.untyped
@pytest.mark.parametrize(("message", "error", "change"), REFUSED + REFUSED_BINS)
def test_bad_options(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    options = RANGE | {"num_bins": 5} | change
    with pytest.raises(error, match=f"hl_gauss_loss: {message}"):
        HLGaussLoss(**options)
    with pytest.raises(error, match=f"hl_gauss_targets: {message}"):
        hl_gauss_targets(torch.zeros(4), **options)
    with pytest.raises(TypeError, match="hl_gauss_targets: target must be a floating"):
        hl_gauss_targets(torch.zeros(4).long(), **RANGE, num_bins=5)


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            hl_gauss_targets,
            lambda: {"target": 3 * torch.randn(5, 2, dtype=torch.float64)},
            options=({"min_value": -1.0, "max_value": 2.0, "num_bins": 4},),
        ),
    ]
