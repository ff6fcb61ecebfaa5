"""Two-hot and C51 targets, against brackets and loops over atoms."""

import bisect
import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.losses import c51_targets, categorical_value, two_hot_targets

import samples
from calls import Call, draw
from helpers import FLOATING, assert_exact, dtype_name

RANGE: dict[str, Any] = {"min_value": -2.0, "max_value": 3.0}


def definition(value: float, points: list[float]) -> list[float]:
    """The two points around a value, found by bisection."""
    value = min(max(value, points[0]), points[-1])
    upper = min(max(bisect.bisect_right(points, value), 1), len(points) - 1)
    below, above = points[upper - 1], points[upper]
    row = [0.0] * len(points)
    row[upper - 1] = (above - value) / (above - below)
    row[upper] = 1 - row[upper - 1]
    return row


def points_of(num_bins: int) -> list[float]:
    return [-2 + 5 * k / (num_bins - 1) for k in range(num_bins)]


def project(probs: Tensor, reward: float, discount: float) -> Tensor:
    """Atom by atom."""
    points = points_of(len(probs))
    total = torch.zeros(len(probs), dtype=torch.float64)
    for probability, point in zip(probs.tolist(), points, strict=True):
        row = definition(reward + discount * point, points)
        total += probability * torch.tensor(row, dtype=torch.float64)
    return total


@given(st.lists(st.floats(-4, 5), min_size=1, max_size=7), st.integers(2, 63))
def test_two_hot_equals_its_definition(values: list[float], bins: int) -> None:
    target = torch.tensor(values, dtype=torch.float64)
    rows = two_hot_targets(target, **RANGE, num_bins=bins)
    expected = [definition(value, points_of(bins)) for value in values]
    torch.testing.assert_close(
        rows, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13
    )
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(target))
    mean = categorical_value(rows.log(), **RANGE, kind="two_hot")
    torch.testing.assert_close(mean, target.clamp(-2, 3))


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("shape", [(), (1,), (63, 2), (0, 3)])
def test_two_hot_in_every_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    target = (2 * torch.randn(shape, dtype=torch.float64)).to(dtype)

    def composed(other: torch.dtype) -> Tensor:
        points = torch.linspace(-2, 3, 100, dtype=other)
        values = target.to(other).clamp(-2, 3)[..., None].contiguous()
        upper = torch.searchsorted(points, values, right=True).clamp(1, 99)
        below, above = points[upper - 1], points[upper]
        share = (above - values) / (above - below)
        empty = torch.zeros(*shape, 100, dtype=other)
        return empty.scatter(-1, upper, 1 - share).scatter(-1, upper - 1, share)

    actual = two_hot_targets(target, **RANGE, num_bins=100)
    assert actual.shape == (*shape, 100)
    assert actual.dtype == dtype
    truth = composed(torch.float64)
    if target.numel() == 1:  # of which a composition is right by luck
        eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        assert (
            (actual.double() - truth).abs() <= 4 * 3 * eps * 99 / 5 + torch.finfo(dtype).eps
        ).all()
        return
    # In single precision also for half, which is rounded once.
    assert_exact(actual, composed(torch.float32), truth, dtype)


def test_points_and_ends() -> None:
    exact = two_hot_targets(torch.arange(-2.0, 4.0), **RANGE, num_bins=6)
    assert torch.equal(exact, torch.eye(6))
    far = two_hot_targets(torch.tensor([-9.0, 1e30, -torch.inf]), **RANGE, num_bins=6)
    assert torch.equal(far, torch.eye(6)[[0, 5, 0]])
    assert two_hot_targets(torch.tensor(torch.nan), **RANGE, num_bins=6).isnan().all()


@given(
    st.integers(2, 20),
    st.lists(st.floats(-6, 6), min_size=1, max_size=5),
    st.floats(0, 1.5),
    st.integers(0, 10**6),
)
def test_c51_equals_its_definition(
    bins: int, rewards: list[float], discount: float, seed: int
) -> None:
    torch.manual_seed(seed)
    probs = torch.randn(len(rewards), bins, dtype=torch.float64).softmax(-1)
    reward = torch.tensor(rewards, dtype=torch.float64)
    actual = c51_targets(probs, reward, discount=discount, **RANGE)
    expected = [project(*row, discount) for row in zip(probs, rewards, strict=True)]
    torch.testing.assert_close(actual, torch.stack(expected), rtol=0, atol=1e-13)
    assert (actual >= 0).all()
    torch.testing.assert_close(actual.sum(-1), torch.ones_like(reward))


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_c51_in_every_dtype(dtype: torch.dtype) -> None:
    probs = torch.randn(63, 7, dtype=torch.float64).softmax(-1).to(dtype)
    reward, discount = torch.randn(63, 2).double().to(dtype).unbind(1)

    def composed(other: torch.dtype) -> Tensor:
        points = torch.linspace(-2, 3, 7, dtype=other)
        moved = reward.to(other)[:, None] + discount.to(other)[:, None] * points
        place = (moved.clamp(-2, 3) + 2) * (6 / 5)
        lower = place.floor().clamp(0, 5)
        mass = probs.to(other)
        total = torch.zeros(63, 7, dtype=other)
        total.scatter_add_(1, lower.long(), mass * (lower + 1 - place))
        return total.scatter_add_(1, lower.long() + 1, mass * (place - lower))

    actual = c51_targets(probs, reward, discount=discount, **RANGE)
    assert actual.dtype == dtype
    # In single precision also for half, which is rounded once.
    assert_exact(actual, composed(torch.float32), composed(torch.float64), dtype)


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 0.5))
def test_c51_of_two_hot_has_the_mean_of_the_return(
    value: float, reward: float, discount: float
) -> None:
    next_probs = two_hot_targets(torch.tensor(value, dtype=torch.float64), **RANGE, num_bins=7)
    rewards = torch.tensor(reward, dtype=torch.float64)
    moved = c51_targets(next_probs, rewards, discount=discount, **RANGE)
    mean = categorical_value(moved.log(), **RANGE, kind="two_hot")
    torch.testing.assert_close(mean.item(), reward + discount * value, rtol=0, atol=1e-12)


def test_the_end_of_an_episode() -> None:
    probs = torch.rand(3, 7, dtype=torch.float64).softmax(-1)
    reward = torch.tensor([0.3, -1.0, 9.0], dtype=torch.float64)
    ended = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    targets = c51_targets(probs, reward, discount=ended, **RANGE)
    rewards = two_hot_targets(reward, **RANGE, num_bins=7)
    torch.testing.assert_close(targets[[0, 2]], rewards[[0, 2]])
    torch.testing.assert_close(targets[1], project(probs[1], -1.0, 1.0))
    torch.testing.assert_close(c51_targets(probs, reward, discount=0.0, **RANGE), rewards)


def test_nothing_changes_without_a_step() -> None:
    probs = torch.rand(2, 3, 7, dtype=torch.float64).softmax(-1)
    same = c51_targets(probs, torch.zeros(2, 3), discount=1.0, **RANGE)
    assert same.dtype == torch.float64
    torch.testing.assert_close(same, probs, rtol=0, atol=1e-13)


def test_nothing_gets_a_gradient_and_nan_shows() -> None:
    leaves = [torch.rand(3, 7).softmax(-1), torch.rand(3), torch.rand(3)]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_()
        before = [tensor.detach().clone() for tensor in leaves]
        assert not c51_targets(leaves[0], leaves[1], discount=leaves[2], **RANGE).requires_grad
        assert all(map(torch.equal, leaves, before))
        before[index][0] = torch.nan
        probs, reward, discount = before
        rows = c51_targets(probs, reward, discount=discount, **RANGE)
        assert rows[0].isnan().any()
        assert rows[1:].isfinite().all()
    assert not two_hot_targets(leaves[1], **RANGE, num_bins=7).requires_grad


@pytest.mark.untyped
def test_transforms() -> None:
    probs = torch.rand(4, 3, 7, dtype=torch.float64).softmax(-1)
    reward, discount = torch.rand(2, 4, 3, dtype=torch.float64)
    calls = (
        (functools.partial(two_hot_targets, **RANGE, num_bins=7), (reward,)),
        (lambda p, r, d: c51_targets(p, r, discount=d, **RANGE), (probs, reward, discount)),
    )
    for function, tensors in calls:
        expected = function(*tensors)
        torch.testing.assert_close(torch.func.vmap(function)(*tensors), expected)
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*tensors), expected)
        strided = [tensor.movedim(0, 1) for tensor in tensors]
        torch.testing.assert_close(function(*strided), expected.movedim(0, 1))


BAD: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("max_value must be above min_value=-2.0, got -2.0", ValueError, {"max_value": -2.0}),
    ("min_value must be a finite number", ValueError, {"min_value": math.nan}),
    ("max_value must be a number", TypeError, {"max_value": None}),
]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        *BAD,
        ("target must be a floating-point", TypeError, {"target": torch.zeros(3).int()}),
        ("num_bins must be an int of at least 2, got 1", ValueError, {"num_bins": 1}),
        ("num_bins must be an int", TypeError, {"num_bins": True}),
    ],
)
def test_bad_two_hot(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"target": torch.zeros(3), "num_bins": 5}
    with pytest.raises(error, match=f"two_hot_targets: {message}"):
        two_hot_targets(**(arguments | RANGE | change))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        *BAD,
        ("next_probs must be of shape", ValueError, {"next_probs": torch.ones(3, 1)}),
        ("next_probs must be a floating-point", TypeError, {"next_probs": torch.ones(3, 4).int()}),
        ("reward must be of shape", ValueError, {"reward": torch.zeros(4)}),
        ("reward must be a floating-point", TypeError, {"reward": torch.zeros(3).int()}),
        ("reward must lie on the device of", ValueError, {"reward": torch.zeros(3).to("meta")}),
        ("discount must be a number", TypeError, {"discount": "0.9"}),
        ("discount must be of shape", ValueError, {"discount": torch.zeros(3, 1)}),
        ("discount must be a floating-point", TypeError, {"discount": torch.zeros(3).bool()}),
        ("discount must lie on the device of", ValueError, {"discount": torch.ones(3).to("meta")}),
    ],
)
def test_bad_c51(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"next_probs": torch.ones(3, 4) / 4, "reward": torch.zeros(3)}
    with pytest.raises(error, match=f"c51_targets: {message}"):
        c51_targets(**(arguments | {"discount": 0.9} | RANGE | change))


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            c51_targets,
            lambda: {"next_probs": draw(5, 4).softmax(-1), "reward": draw(5)},
            options=({"discount": 0.9, "min_value": -1.0, "max_value": 2.0},),
        ),
        Call(
            two_hot_targets,
            lambda: {"target": draw(5, 2)},
            options=({"min_value": -1.0, "max_value": 2.0, "num_bins": 4},),
        ),
    ]
