"""Rotations keep everything but the entries; the rounding is that of explicit elimination."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.quant import (
    IncoherenceTransform,
    hessian_loss,
    incoherence_preprocess,
    quip_quantize,
    rtn_quantize,
)

from quant.rounding.problems import damped, drawn, eliminated

KINDS = ["kronecker", "hadamard", "orthogonal", "identity"]


def sizes(kind: str) -> tuple[int, int]:
    return (8, 16) if kind == "hadamard" else (6, 15)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_weights_survive_the_rotation(kind: str, rescale: bool) -> None:
    weight, hessian = drawn(*sizes(kind))
    rotated, turned, transform = incoherence_preprocess(weight, hessian, kind=kind, rescale=rescale)
    for matrix in (transform.left, transform.right):
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(len(matrix), dtype=torch.float64))
    scaled = torch.einsum(
        "ao,oj,j,bj->ab", transform.left, weight, transform.column_scale, transform.right
    )
    torch.testing.assert_close(rotated, scaled)
    torch.testing.assert_close(transform.forward(weight), rotated)
    torch.testing.assert_close(transform.inverse(rotated), weight)
    other = weight + torch.randn_like(weight)
    torch.testing.assert_close(
        hessian_loss(rotated, transform.forward(other), turned),
        hessian_loss(weight, other, hessian),
    )
    if kind == "identity":
        assert torch.equal(transform.left, torch.eye(6, dtype=torch.float64))


def test_the_scale_of_columns() -> None:
    weight, hessian = drawn()
    weight[:, 4] = 0
    hessian[:, 7] = hessian[7] = 0
    *_, transform = incoherence_preprocess(weight, hessian, kind="identity")
    most = max(abs(value) for row in hessian.tolist() for value in row)
    for j in range(23):
        h = max(hessian[j, j].item() / most, 1e-8)
        v = max(sum(value**2 for value in weight[:, j].tolist()), 1e-8)
        expected = max((h / v) ** 0.25, 1e-8)
        assert transform.column_scale[j].item() == pytest.approx(expected)
    *_, plain = incoherence_preprocess(weight, hessian, kind="identity", rescale=False)
    assert torch.equal(plain.column_scale, torch.ones(23, dtype=torch.float64))
    *_, dead = incoherence_preprocess(weight, torch.zeros_like(hessian), kind="identity")
    assert dead.column_scale.isfinite().all()


@pytest.mark.parametrize(
    ("size", "first", "second"),
    [(1, 1, 1), (7, 7, 1), (6, 2, 3), (12, 6, 2), (30, 10, 3), (16, 4, 4), (8, 4, 2)],
)
def test_the_factors_of_the_kronecker_product(
    size: int, first: int, second: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
    weight = torch.randn(size, 3, dtype=torch.float64)
    *_, transform = incoherence_preprocess(weight, torch.eye(3, dtype=torch.float64))
    parts = transform.left.reshape(first, second, first, second).permute(0, 2, 1, 3)
    singular = torch.linalg.svdvals(parts.reshape(first**2, second**2))
    assert singular[0] == pytest.approx(math.sqrt(size))
    assert singular[1:].sum() < 1e-9
    blocks = parts.reshape(first**2, second**2)
    pair = torch.linalg.svd(blocks)
    left = (pair.U[:, 0] * math.sqrt(first)).reshape(first, first)
    if first % 2 == 0:  # else the sign of the factor is not known
        assert torch.linalg.det(left).item() == pytest.approx(1.0)
    assert torch.linalg.det(transform.left).item() == pytest.approx(1.0)


def test_rows_and_columns_are_permuted() -> None:
    weight = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(0)
    matrices = [
        incoherence_preprocess(weight, torch.eye(6, dtype=torch.float64))[2].right
        for _ in range(40)
    ]
    mean = torch.stack(matrices).square().mean(0)
    torch.testing.assert_close(mean, torch.full_like(mean, 1 / 6), rtol=0, atol=0.14)
    products = [m.reshape(2, 3, 2, 3).permute(0, 2, 1, 3).reshape(4, 9) for m in matrices]
    assert any(torch.linalg.svdvals(one)[1] > 0.1 for one in products)


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("passes", [0, 2])
def test_rounding_is_that_of_explicit_elimination(bits: int, passes: int) -> None:
    weight, hessian = drawn(6, 14)
    generator = torch.Generator().manual_seed(5)
    state = copy.copy(generator.get_state())
    found = quip_quantize(
        weight, hessian, bits=bits, rho=2.0, damp=0.03, generator=generator, greedy_passes=passes
    )
    generator.set_state(state)
    rotated, turned, transform = incoherence_preprocess(weight, hessian, generator=generator)
    assert torch.equal(found.transform.left, transform.left)
    assert (found.axis, found.group_size, found.bits) == ("tensor", None, bits)
    root = math.sqrt(sum(v * v for row in rotated.tolist() for v in row) / (6 * 14))
    step, zero = 2 * 2.0 * root / (2**bits - 1), (2**bits - 1) / 2
    assert found.scale.item() == pytest.approx(step)
    assert found.zero_point.item() == zero
    matrix, codes = damped(turned, 0.03), torch.zeros(6, 14)

    def rule(position: int, current: Tensor) -> Tensor:
        q = (current[:, position] / step + zero).round().clamp(0, 2**bits - 1)
        codes[:, position] = q
        return step * (q - zero)

    eliminated(rotated, matrix, rule)
    values = step * (codes.double() - zero)
    for _ in range(passes):
        for k in range(14):
            slope = sum((values[:, j] - rotated[:, j]) * matrix[j, k] for j in range(14) if j != k)
            best = rotated[:, k] - slope / matrix[k, k]
            values[:, k] = step * ((best / step + zero).round().clamp(0, 2**bits - 1) - zero)
    codes = values / step + zero
    assert torch.equal(found.codes.double(), codes.round().double())
    expected = transform.left.T @ values @ transform.right / transform.column_scale
    torch.testing.assert_close(found.dequantize(), expected)


def test_the_same_generator_gives_the_same() -> None:
    weight, hessian = drawn()
    results = [
        quip_quantize(weight, hessian, generator=torch.Generator().manual_seed(seed)).dequantize()
        for seed in (1, 1, 2)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_it_beats_rounding_to_nearest() -> None:
    for bits in (2, 3):
        ours, nearest = 0.0, 0.0
        for _ in range(5):
            weight, hessian = drawn(32, 32)
            found = quip_quantize(weight, hessian, bits=bits).dequantize()
            ours += hessian_loss(weight, found, hessian).item()
            plain = rtn_quantize(weight, bits=bits).dequantize()
            nearest += hessian_loss(weight, plain, hessian).item()
        assert ours < 0.8 * nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_dead_columns(dtype: torch.dtype) -> None:
    weight, hessian = (tensor.float() for tensor in drawn(5, 8))
    hessian[2] = hessian[:, 2] = 0
    weight, before = weight.to(dtype), hessian.clone()
    found = quip_quantize(weight, hessian, bits=4)
    assert found.dequantize().dtype == dtype
    assert found.dequantize().isfinite().all()
    assert found.scale.dtype == found.transform.left.dtype == torch.float32
    assert torch.equal(hessian, before)
    moved = found.to("meta")
    assert moved.transform.right.is_meta
    assert "8" in repr(found.transform)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"left": torch.ones(2, 3)}, ValueError, "left must be a square matrix"),
        ({"right": torch.ones(3)}, ValueError, "right must be a square matrix"),
        ({"column_scale": torch.ones(3)}, ValueError, r"column_scale must be of shape \(2,\)"),
        ({"left": torch.ones(2, 2).long()}, TypeError, "left must be a floating-point tensor"),
    ],
)
def test_a_transform_of_what_does_not_fit(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"left": torch.eye(2), "right": torch.eye(2), "column_scale": torch.ones(2)}
    with pytest.raises(error, match=rf"^IncoherenceTransform: {message}"):
        IncoherenceTransform(**(given | change))
