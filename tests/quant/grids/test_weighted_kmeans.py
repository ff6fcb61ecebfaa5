"""Lloyd's rounds against plain loops."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tilework.quant import weighted_kmeans


def plain(
    vectors: list[list[float]],
    weight: list[float],
    centroids: list[list[float]],
    iterations: int,
    tol: float,
) -> tuple[list[list[float]], list[int], list[float]]:
    def assign() -> list[int]:
        result = []
        for v in vectors:
            distances = [sum((a - b) ** 2 for a, b in zip(v, c, strict=True)) for c in centroids]
            result.append(distances.index(min(distances)))
        return result

    inertias: list[float] = []
    for _ in range(iterations):
        indices = assign()
        pairs = zip(vectors, weight, indices, strict=True)
        inertia = sum(
            w * sum((a - b) ** 2 for a, b in zip(v, centroids[i], strict=True)) for v, w, i in pairs
        )
        inertias.append(inertia)
        if len(inertias) > 1 and inertias[-2] - inertia <= tol * inertias[-2]:
            break
        for k in range(len(centroids)):
            mine = [n for n, i in enumerate(indices) if i == k]
            total = sum(weight[n] for n in mine)
            if total > 0:
                centroids[k] = [
                    sum(weight[n] * vectors[n][d] for n in mine) / total
                    for d in range(len(vectors[0]))
                ]
    return centroids, assign(), inertias


@pytest.mark.parametrize(
    ("iterations", "tol"), [(0, 0.0), (1, 0.0), (3, 0.0), (50, 1e-5), (50, 0.05)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_plain_loops(iterations: int, tol: float, weighted: bool) -> None:
    vectors = torch.randn(60, 3, dtype=torch.float64)
    weight = torch.rand(60, dtype=torch.float64).pow(3) if weighted else None
    initial = torch.cat([vectors[:6], torch.full((1, 3), 50.0, dtype=torch.float64)])
    before = initial.clone()
    centroids, indices = weighted_kmeans(
        vectors, weight, num_centroids=7, initial=initial, iterations=iterations, tol=tol
    )
    weights = [1.0] * 60 if weight is None else weight.tolist()
    expected, places, inertias = plain(vectors.tolist(), weights, initial.tolist(), iterations, tol)
    torch.testing.assert_close(centroids, torch.tensor(expected, dtype=torch.float64))
    assert indices.tolist() == places
    assert inertias == sorted(inertias, reverse=True)
    assert torch.equal(initial, before)
    assert torch.equal(centroids[6], initial[6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_vectors_that_are_centroids_are_found_exactly(dtype: torch.dtype) -> None:
    far = 1e4 + torch.arange(300).reshape(100, 3) / 64
    vectors = far.to(dtype)
    book = vectors.unique(dim=0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    centroids, indices = weighted_kmeans(
        vectors, num_centroids=len(book), initial=book, iterations=3
    )
    assert centroids.dtype == wide
    torch.testing.assert_close(centroids[indices], vectors.to(wide), rtol=1e-6, atol=0)
    _, found = weighted_kmeans(vectors, num_centroids=len(book), initial=book, iterations=0)
    assert torch.equal(book[found], vectors)


def test_ties_go_to_the_first() -> None:
    vectors = torch.tensor([[0.5], [0.0], [1.0], [1.5]])
    book = torch.tensor([[1.0], [0.0], [1.0], [2.0]])
    _, indices = weighted_kmeans(vectors, num_centroids=4, initial=book, iterations=0)
    assert indices.tolist() == [0, 1, 0, 0]


def test_many_near_centroids_across_chunks() -> None:
    vectors = torch.randn(5000, 2)
    book = torch.randn(700, 2).round(decimals=1)
    _, indices = weighted_kmeans(vectors, num_centroids=700, initial=book, iterations=0)
    distances = torch.cdist(vectors.double(), book.double()).square()
    best = distances.amin(1)
    chosen = distances.gather(1, indices.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, best, rtol=1e-5, atol=1e-7)
    same = (book[indices].unsqueeze(1) == book).all(-1)
    assert torch.equal(same.int().argmax(1), indices)


def test_the_draw_is_by_weight_and_without_repetition() -> None:
    vectors = torch.arange(4.0).unsqueeze(1)
    weight = torch.tensor([0.0, 1.0, 2.0, 5.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(2000):
        centroids, _ = weighted_kmeans(
            vectors, weight, num_centroids=1, iterations=0, generator=generator
        )
        counts[int(centroids)] += 1
    assert counts[0] == 0
    expected = torch.tensor([1.0, 2.0, 5.0]) / 8
    deviation = (expected * (1 - expected) / 2000).sqrt()
    assert ((counts[1:] / 2000 - expected).abs() < 4 * deviation).all()
    centroids, _ = weighted_kmeans(vectors, num_centroids=4, iterations=0)
    assert sorted(centroids.flatten().tolist()) == [0, 1, 2, 3]
    states = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, second = (
        weighted_kmeans(
            torch.randn(50, 2, generator=torch.Generator().manual_seed(1)),
            num_centroids=5,
            generator=one,
        )[0]
        for one in states
    )
    assert torch.equal(first, second)


def test_fewer_vectors_than_centroids() -> None:
    vectors = torch.tensor([[3.0], [1.0], [2.0]])
    centroids, indices = weighted_kmeans(vectors, num_centroids=5, iterations=0)
    assert centroids.flatten().tolist() == [3.0, 1.0, 2.0, 3.0, 3.0]
    assert indices.tolist() == [0, 1, 2]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vectors": torch.ones(0, 2)}, ValueError, "vectors must be a non-empty matrix"),
        ({"vectors": torch.ones(3, 2).long()}, TypeError, "vectors must be a floating-point"),
        ({"vectors": torch.full((3, 2), torch.nan)}, ValueError, "vectors must be finite"),
        ({"weight": torch.ones(2)}, ValueError, r"weight must be of shape \(3,\)"),
        ({"weight": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "weight must be at least 0"),
        ({"weight": torch.tensor([1.0, torch.inf, 1.0])}, ValueError, "weight must be finite"),
        ({"weight": torch.ones(3).long()}, TypeError, "weight must be a floating-point"),
        ({"num_centroids": 0}, ValueError, "num_centroids must be an int of at least 1"),
        ({"num_centroids": 2.0}, TypeError, "num_centroids must be an int"),
        ({"initial": torch.ones(3, 2)}, ValueError, r"initial must be of shape \(2, 2\)"),
        ({"initial": torch.full((2, 2), torch.inf)}, ValueError, "initial must be finite"),
        ({"iterations": -1}, ValueError, "iterations must be an int of at least 0"),
        ({"tol": -1.0}, ValueError, "tol must be a finite number of at least 0"),
    ],
    ids=str,
)
def test_refusals(change: dict[str, object], error: type[Exception], message: str) -> None:
    given: dict[str, object] = {"vectors": torch.ones(3, 2), "num_centroids": 2}
    with pytest.raises(error, match=rf"^weighted_kmeans: {message}"):
        weighted_kmeans(**(given | change))  # type: ignore[arg-type]


def test_inertia_never_rises() -> None:
    vectors, weight = torch.randn(300, 4), torch.rand(300)
    values = []
    for iterations in range(8):
        centroids, indices = weighted_kmeans(
            vectors, weight, num_centroids=9, initial=vectors[:9], iterations=iterations, tol=0.0
        )
        values.append(inertia(vectors, weight, centroids, indices))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(values))


def inertia(vectors: Tensor, weight: Tensor, centroids: Tensor, indices: Tensor) -> float:
    return float((weight * (vectors - centroids[indices]).square().sum(1)).sum())
