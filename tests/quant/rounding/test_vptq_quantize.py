"""VPTQ against explicit elimination with codebooks of its own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.quant import VectorQuantizedTensor, hessian_loss, vptq_quantize, weighted_kmeans

from quant.rounding.problems import damped, drawn, eliminated


def cut(column: Tensor, length: int) -> list[Tensor]:
    """A column in vectors, the last filled with zeros."""
    padded = torch.cat([column, column.new_zeros(-len(column) % length)])
    return [padded[k : k + length] for k in range(0, len(padded), length)]


def closest(vector: Tensor, book: Tensor) -> int:
    distances = [
        sum((a - b) ** 2 for a, b in zip(vector.tolist(), c, strict=True)) for c in book.tolist()
    ]
    return distances.index(min(distances))


def swept(weight: Tensor, hessian: Tensor, books: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What stands for the weights, and what each column was at its turn."""
    values, seen = torch.zeros_like(weight), torch.zeros_like(weight)
    length = books[0].shape[1]

    def rule(position: int, current: Tensor) -> Tensor:
        seen[:, position] = current[:, position]
        found = []
        for vector in cut(current[:, position], length):
            total = torch.zeros_like(vector)
            for book in books:
                total = total + book[closest(vector - total, book)]
            found.append(total)
        values[:, position] = torch.cat(found)[: len(weight)]
        return values[:, position]

    eliminated(weight, hessian, rule)
    return values, seen


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("residual", [None, 3])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_explicit_elimination(
    normalize: bool, act_order: bool, residual: int | None, length: int
) -> None:
    weight, hessian = drawn(6, 11)
    hessian[4] = hessian[:, 4] = 0
    initial = torch.randn(5, length, dtype=torch.float64)
    first = torch.randn(3, length, dtype=torch.float64) / 3
    found = vptq_quantize(
        weight,
        hessian,
        vector_length=length,
        num_centroids=5,
        residual_centroids=residual,
        act_order=act_order,
        normalize=normalize,
        initial=initial,
        residual_initial=None if residual is None else first,
        damp=0.02,
    )
    cleaned, bias, scale = weight.clone(), torch.zeros(11), torch.ones(11)
    cleaned[:, 4] = 0
    if normalize:
        bias, scale = cleaned.amin(0), cleaned.amax(0) - cleaned.amin(0)
        scale[4] = 1
        cleaned = (cleaned - bias) / scale
    rescaled = hessian * scale * scale.unsqueeze(1)
    order = list(range(11))
    if act_order:
        order = sorted(order, key=lambda j: -rescaled[j, j].item())
    ordered, matrix = cleaned[:, order], damped(rescaled, 0.02)[order][:, order]
    vectors = torch.stack([v for column in ordered.T for v in cut(column, length)])
    weights = torch.tensor(
        [rescaled[j, j].item() for j in order for _ in range(-(-6 // length))], dtype=torch.float64
    )
    book, _ = weighted_kmeans(vectors, weights, num_centroids=5, initial=initial)
    values, seen = swept(ordered, matrix, [book])
    books = [book]
    if residual is not None:
        left = torch.stack([v for column in (seen - values).T for v in cut(column, length)])
        second, _ = weighted_kmeans(left, weights, num_centroids=3, initial=first)
        books.append(second)
        values, _ = swept(ordered, matrix, books)
    torch.testing.assert_close(found.centroids, books[0])
    if residual is not None:
        torch.testing.assert_close(found.residual_centroids, books[1])
    back = torch.tensor(order).argsort()
    torch.testing.assert_close(found.dequantize(), values[:, back] * scale + bias)
    assert (found.column_scale is not None) == normalize


def test_a_book_of_all_vectors_reconstructs() -> None:
    weight, hessian = drawn(6, 9)
    vectors = torch.stack([v for column in weight.T for v in cut(column, 3)])
    found = vptq_quantize(
        weight,
        hessian,
        vector_length=3,
        num_centroids=20,
        initial=torch.cat([vectors, vectors[:2]]),
    )
    torch.testing.assert_close(found.dequantize(), weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [1, 7, 128])
def test_blocks_change_nothing(block: int) -> None:
    weight, hessian = drawn(8, 20)
    options: dict[str, Any] = {"vector_length": 2, "num_centroids": 6, "initial": weight[:6, :2]}
    found = vptq_quantize(weight, hessian, block_size=block, **options)
    whole = vptq_quantize(weight, hessian, block_size=20, **options)
    assert torch.equal(found.indices, whole.indices)


def test_a_diagonal_hessian_rounds_to_the_nearest() -> None:
    weight, _ = drawn(6, 7)
    hessian = torch.diag(torch.rand(7, dtype=torch.float64) + 0.1)
    found = vptq_quantize(weight, hessian, vector_length=2, num_centroids=4)
    for j in range(7):
        for k, vector in enumerate(cut(weight[:, j], 2)):
            assert found.indices[k, j] == closest(vector, found.centroids)


def test_errors_made_up_for_cost_less_than_nearest_vectors() -> None:
    ours, nearest = 0.0, 0.0
    for _ in range(8):
        weight, hessian = drawn(12, 32)
        found = vptq_quantize(weight, hessian, vector_length=2, num_centroids=16)
        ours += hessian_loss(weight, found.dequantize(), hessian).item()
        columns = [
            torch.cat([found.centroids[closest(v, found.centroids)] for v in cut(column, 2)])
            for column in weight.T
        ]
        nearest += hessian_loss(weight, torch.stack(columns, 1), hessian).item()
    assert ours < 0.9 * nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_draws(dtype: torch.dtype) -> None:
    weight, hessian = drawn(5, 7)
    weight = weight.to(dtype)
    found = [
        vptq_quantize(
            weight,
            hessian.float(),
            num_centroids=3,
            residual_centroids=2,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1)
    ]
    assert isinstance(found[0], VectorQuantizedTensor)
    assert found[0].dequantize().dtype == dtype
    assert found[0].centroids.dtype == torch.float32
    assert torch.equal(found[0].dequantize(), found[1].dequantize())
    dead = vptq_quantize(weight, torch.zeros(7, 7), num_centroids=2)
    assert not dead.dequantize().any()
