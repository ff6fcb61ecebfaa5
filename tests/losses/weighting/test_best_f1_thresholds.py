"""The best thresholds, against scikit-learn's F1 score at every candidate."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch import Tensor

from tilework.losses import F1Thresholds, best_f1_thresholds

import samples
from calls import Call, draw
from helpers import FLOATING, dtype_name


def by_scikit_learn(scores: Tensor, target: Tensor) -> tuple[list[float], list[float]]:
    thresholds, best = [], []
    for column, labels in zip(scores.double().T, target.int().T, strict=True):
        candidates = []
        for threshold in set(column.tolist()):
            f1 = f1_score(labels.numpy(), (column >= threshold).int().numpy(), zero_division=0)
            candidates.append((round(f1, 12), threshold))
        f1, threshold = max(candidates)
        thresholds.append(threshold)
        best.append(f1)
    return thresholds, best


@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))
def test_equals_scikit_learns(rows: int, classes: int, levels: int, seed: int) -> None:
    """Few levels of scores make ties, few rows classes without positives."""
    torch.manual_seed(seed)
    scores = torch.randint(levels, (rows, classes)) / levels
    target = torch.rand(rows, classes) < torch.rand(classes)
    actual = best_f1_thresholds(scores, target)
    thresholds, f1 = by_scikit_learn(scores, target)
    torch.testing.assert_close(actual.threshold, torch.tensor(thresholds))
    torch.testing.assert_close(actual.f1, torch.tensor(f1))


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("integer", [torch.bool, torch.uint8, torch.int64])
def test_dtypes_and_strides(dtype: torch.dtype, integer: torch.dtype) -> None:
    scores = torch.randn(4, 100).to(dtype).T
    target = (torch.rand(4, 100) < 0.3).to(integer).T
    before = scores.clone(), target.clone()
    actual = best_f1_thresholds(scores, target)
    assert torch.equal(scores, before[0])
    assert torch.equal(target, before[1])
    thresholds, f1 = by_scikit_learn(scores, target)
    assert actual.threshold.dtype == actual.f1.dtype == dtype
    assert actual.threshold.tolist() == thresholds
    torch.testing.assert_close(actual.f1, torch.tensor(f1).to(dtype))


def test_a_class_without_positives_gets_its_largest_score() -> None:
    scores = torch.tensor([[0.1, 0.3], [0.5, 0.2], [0.4, 0.9]])
    actual = best_f1_thresholds(scores, torch.zeros(3, 2, dtype=torch.bool))
    assert isinstance(actual, F1Thresholds)
    torch.testing.assert_close(actual.threshold, torch.tensor([0.5, 0.9]))
    assert actual.f1.tolist() == [0, 0]


def test_nan_and_infinity() -> None:
    scores = torch.tensor([[torch.nan, torch.inf], [0.5, 0.2], [0.4, -torch.inf]])
    target = torch.tensor([[True, True], [True, False], [False, False]])
    threshold, f1 = best_f1_thresholds(scores, target)
    assert threshold[0].isnan()
    assert f1[0].isnan()
    assert threshold[1] == torch.inf
    assert f1[1] == 1


@pytest.mark.untyped
def test_transforms() -> None:
    scores = torch.rand(2, 9, 3, requires_grad=True)
    target = torch.rand(2, 9, 3) < 0.5
    expected = [best_f1_thresholds(*pair) for pair in zip(scores, target, strict=True)]
    assert not expected[0].f1.requires_grad
    compiled = torch.compile(best_f1_thresholds, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores[0], target[0]).threshold, expected[0].threshold)
    batched = torch.func.vmap(best_f1_thresholds)(scores, target)
    assert torch.equal(batched.threshold, torch.stack([one.threshold for one in expected]))
    wrong = torch.func.vmap(best_f1_thresholds)(scores, 2 * target.int())
    assert wrong.threshold.isnan().all()
    assert wrong.f1.isnan().all()


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        (r"scores must be of shape \(N, C\), N >= 1", ValueError, {"scores": torch.zeros(4)}),
        (r"scores must be of shape \(N, C\), N >= 1", ValueError, {"scores": torch.zeros(0, 3)}),
        ("scores must be a floating-point", TypeError, {"scores": torch.zeros(4, 3).int()}),
        (r"target must be of shape \(4, 3\)", ValueError, {"target": torch.zeros(4, 1).int()}),
        ("target must be bool or integer", TypeError, {"target": torch.zeros(4, 3)}),
        ("target must be 0 or 1 everywhere, got 2", ValueError, {"target": torch.full((4, 3), 2)}),
        (
            "target must lie on the device",
            ValueError,
            {"target": torch.zeros(4, 3, dtype=torch.int64, device="meta")},
        ),
    ],
)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments = {"scores": torch.zeros(4, 3), "target": torch.zeros(4, 3, dtype=torch.int64)}
    with pytest.raises(error, match=f"best_f1_thresholds: {message}"):
        best_f1_thresholds(**(arguments | change))


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            best_f1_thresholds,
            lambda: {"scores": draw(7, 3), "target": torch.randint(2, (7, 3))},
        ),
    ]
