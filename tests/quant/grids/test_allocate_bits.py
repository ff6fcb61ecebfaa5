"""Bits under a budget, by trying all thresholds."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilework.quant import allocate_bits, size_aware_score

from calls import draw
from helpers import FLOATING


def tried(
    scores: list[list[float]], sizes: list[float], candidates: tuple[int, ...], budget: float
) -> tuple[list[int], float, float] | None:
    """The bits, their average and the threshold."""
    for threshold in sorted(score for row in scores for score in row):
        bits = []
        for row in scores:
            kept = [b for b, score in zip(candidates, row, strict=True) if score <= threshold]
            bits.append(min(kept) if kept else max(candidates))
        costs = [math.log2(2**b + 1) for b in bits]
        average = sum(n * c for n, c in zip(sizes, costs, strict=True)) / sum(sizes)
        if average <= budget + 1e-12:
            return bits, average, threshold
    return None


@given(
    st.integers(1, 6),
    st.sampled_from([(1, 2, 3), (2,), (1, 4), (1, 2, 3, 8)]),
    st.floats(1.0, 4.0),
    st.integers(0, 10**6),
)
def test_the_smallest_threshold(
    layers: int, candidates: tuple[int, ...], budget: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    scores = torch.from_numpy(random.random((layers, len(candidates))).round(1))
    sizes = torch.from_numpy(random.integers(1, 9, layers))
    truth = tried(scores.tolist(), sizes.tolist(), candidates, budget)
    if truth is None:
        least = math.log2(2 ** candidates[0] + 1)
        with pytest.raises(ValueError, match=rf"^allocate_bits: budget must be at least {least}"):
            allocate_bits(scores, sizes, candidates=candidates, budget=budget)
        return
    bits, average = allocate_bits(scores, sizes, candidates=candidates, budget=budget)
    assert bits.dtype == torch.int64
    assert bits.tolist() == truth[0]
    assert average == pytest.approx(truth[1], rel=1e-12)
    assert average <= budget
    more, larger = allocate_bits(scores, sizes, candidates=candidates, budget=budget + 0.5)
    assert larger >= average
    assert (more >= bits).all()


def test_a_budget_may_be_met_exactly() -> None:
    scores, sizes = torch.rand(7, 3), torch.tensor([3, 1, 7, 11, 13, 17, 19])
    bits, average = allocate_bits(scores, sizes, budget=math.log2(3))
    assert bits.tolist() == [1] * 7
    assert average == math.log2(3)
    assert allocate_bits(scores, sizes)[1] <= 1.99
    assert allocate_bits(scores, sizes.double(), budget=9)[1] <= math.log2(9)


@pytest.mark.parametrize("dtype", FLOATING)
def test_scores(dtype: torch.dtype) -> None:
    error, size = draw(4, 3).abs().to(dtype), torch.tensor([[10], [200], [3000], [7]])
    found = size_aware_score(error, size)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row, n, ours in zip(error.tolist(), size.flatten().tolist(), found.tolist(), strict=True):
        assert ours == pytest.approx([e / n**0.3 for e in row], rel=1e-5)
    assert torch.equal(size_aware_score(error, 10.0)[0], found[0])
    torch.testing.assert_close(size_aware_score(error, 4, eta=-0.5), 2 * error.to(found.dtype))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.ones(2, 2)}, ValueError, r"scores must be of shape \(layers, 3\)"),
        ({"scores": torch.ones(3)}, ValueError, r"scores must be of shape \(layers, 3\)"),
        ({"scores": torch.ones(0, 3)}, ValueError, r"scores must be of shape \(layers, 3\)"),
        ({"scores": torch.full((2, 3), torch.nan)}, ValueError, "scores must be finite"),
        ({"scores": torch.ones(2, 3).long()}, TypeError, "scores must be a floating-point"),
        ({"sizes": torch.ones(3)}, ValueError, r"sizes must be of shape \(2,\)"),
        ({"sizes": torch.tensor([1, 0])}, ValueError, "sizes must be finite and above 0"),
        ({"sizes": torch.tensor([1, torch.inf])}, ValueError, "sizes must be finite and above"),
        ({"sizes": torch.tensor([True, True])}, TypeError, "sizes must be an integer or float"),
        ({"sizes": [1, 2]}, TypeError, "sizes must be an integer or floating-point tensor"),
        ({"candidates": (2, 1, 3)}, ValueError, "candidates must be ascending from at least 1"),
        ({"candidates": (0, 1, 2)}, ValueError, "candidates must be ascending from at least 1"),
        ({"candidates": ()}, ValueError, "candidates must be ascending"),
        ({"candidates": (1, 2.0, 3)}, TypeError, "candidates must be an int"),
        ({"candidates": 3}, TypeError, "candidates must be a sequence of ints"),
        ({"budget": 0.0}, ValueError, "budget must be a finite number above 0"),
        ({"budget": math.nan}, ValueError, "budget must be a finite number above 0"),
        ({"budget": 1.5}, ValueError, "budget must be at least 1.58496250072115"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"scores": torch.ones(2, 3), "sizes": torch.tensor([1, 2])}
    with pytest.raises(error, match=rf"^allocate_bits: {message}"):
        allocate_bits(**(given | change))


@pytest.mark.untyped
def test_bad_sizes() -> None:
    error = torch.ones(2, 3)
    for size, kind, message in (
        (0, ValueError, "size must be a finite number above 0"),
        ("1", TypeError, "size must be a number"),
        (torch.tensor([1, 0, 1]), ValueError, "size must be finite and above 0 everywhere"),
        (torch.ones(2), ValueError, r"size must be broadcastable against shape \(2, 3\)"),
        (torch.ones(3).cfloat(), TypeError, "size must be an integer or floating-point tensor"),
    ):
        with pytest.raises(kind, match=rf"^size_aware_score: {message}"):
            size_aware_score(error, size)
    with pytest.raises(TypeError, match=r"^size_aware_score: error must be a floating-point"):
        size_aware_score(error.long(), 1)
    with pytest.raises(ValueError, match=r"^size_aware_score: eta must be a finite number"):
        size_aware_score(error, 1, eta=math.nan)
