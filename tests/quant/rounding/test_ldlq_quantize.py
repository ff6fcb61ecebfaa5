"""LDLQ, against its definition by factors of the Hessian."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.quant import fit_grid, gptq_quantize, hessian_loss, ldlq_quantize, rtn_quantize

from quant.rounding.problems import damped, drawn


def factors(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """M, strictly upper triangular, and D: column by column from the last."""
    n = len(hessian)
    unit, pivots = torch.eye(n, dtype=hessian.dtype), torch.zeros(n, dtype=hessian.dtype)
    for k in reversed(range(n)):
        pivots[k] = hessian[k, k] - sum(unit[k, i] ** 2 * pivots[i] for i in range(k + 1, n))
        for j in range(k):
            rest = hessian[j, k] - sum(unit[j, i] * unit[k, i] * pivots[i] for i in range(k + 1, n))
            unit[j, k] = rest / pivots[k]
    return unit - torch.eye(n, dtype=hessian.dtype), pivots


def test_the_factors_of_this_test_are_factors() -> None:
    _, hessian = drawn(1, 8)
    feedback, pivots = factors(hessian)
    unit = feedback + torch.eye(8, dtype=hessian.dtype)
    torch.testing.assert_close(unit @ pivots.diag() @ unit.T, hessian)
    assert not feedback.tril().any()


@pytest.mark.parametrize("group_size", [None, 5, 30])
def test_is_its_definition(group_size: int | None) -> None:
    weight, hessian = drawn(5, 13)
    hessian[4] = hessian[:, 4] = 0.0
    zeroed = weight.clone()
    zeroed[:, 4] = 0.0
    full = damped(hessian, 0.02)
    feedback, pivots = factors(full)
    scale, zero_point = fit_grid(zeroed, bits=3, group_size=group_size)
    values = torch.zeros_like(weight)
    seen = torch.zeros_like(weight)
    codes = torch.zeros(weight.shape)
    for k in range(13):
        group = k // (group_size or 13)
        v = zeroed[:, k].clone()
        for j in range(k):
            v += (zeroed[:, j] - values[:, j]) * feedback[j, k]
        q = (v / scale[:, group] + zero_point[:, group]).round().clamp(0, 7)
        values[:, k] = scale[:, group] * (q - zero_point[:, group])
        seen[:, k], codes[:, k] = v, q
    quantized = ldlq_quantize(weight, hessian, bits=3, group_size=group_size, damp=0.02)
    assert torch.equal(quantized.codes.double(), codes.double())
    torch.testing.assert_close(quantized.dequantize(), values)
    noise = values - seen
    torch.testing.assert_close(
        hessian_loss(zeroed, quantized.dequantize(), full), (noise.square() * pivots).sum()
    )


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "restricted", "minmax"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_is_gptq_with_static_scales(scheme: str, group_size: int | None) -> None:
    weight, hessian = drawn(4, 150)
    options: dict[str, Any] = {"bits": 2, "group_size": group_size, "scheme": scheme}
    ours = ldlq_quantize(weight, hessian, **options)
    assert torch.equal(ours.codes, gptq_quantize(weight, hessian, scales="static", **options).codes)


def test_uncorrelated_inputs_are_rounding_to_nearest() -> None:
    weight = torch.randn(5, 11)
    hessian = torch.rand(11).add(0.1).diag()
    for passes in (0, 3):
        ours = ldlq_quantize(weight, hessian, group_size=4, greedy_passes=passes)
        assert torch.equal(ours.codes, rtn_quantize(weight, group_size=4).codes)


def test_a_grid_that_is_given() -> None:
    weight, hessian = drawn(3, 7)
    grid = fit_grid(weight, bits=3, group_size=3)
    one = ldlq_quantize(weight, hessian, bits=3, group_size=3, grid=grid)
    assert torch.equal(one.codes, ldlq_quantize(weight, hessian, bits=3, group_size=3).codes)
    whole = torch.tensor([[0.7]], dtype=torch.float64), torch.tensor([[3.5]], dtype=torch.float64)
    rows = tuple(part.expand(3, 1) for part in whole)
    for rows_of_weight in (weight, weight[:1]):
        one = ldlq_quantize(rows_of_weight, hessian, bits=3, grid=whole)
        assert one.axis == "tensor"
        other = ldlq_quantize(weight, hessian, bits=3, grid=(rows[0], rows[1]))
        assert torch.equal(one.codes, other.codes[: len(rows_of_weight)])
        torch.testing.assert_close(one.dequantize(), other.dequantize()[: len(rows_of_weight)])
    wide = ldlq_quantize(weight.float(), hessian.float(), bits=3, grid=whole)
    assert wide.scale.dtype == torch.float64
    assert wide.dequantize().dtype == torch.float32


def greedy(weight: Tensor, values: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """A pass by the page, entry by entry."""
    values = values.clone()
    for k in range(weight.shape[1]):
        for o in range(len(weight)):
            pull = sum(
                (values[o, j] - weight[o, j]) * hessian[j, k]
                for j in range(weight.shape[1])
                if j != k
            )
            target = (weight[o, k] - pull / hessian[k, k]).item()
            code = min(max(round(target / scale[o, 0].item() + zero[o, 0].item()), 0), 7)
            values[o, k] = scale[o, 0] * (code - zero[o, 0])
    return values


def test_greedy_passes() -> None:
    weight, hessian = drawn(6, 30)
    full = damped(hessian, 0.01)
    scale, zero_point = fit_grid(weight, bits=3)
    values = ldlq_quantize(weight, hessian, bits=3).dequantize()
    losses = [hessian_loss(weight, values, full).item()]
    for passes in (1, 2, 3):
        values = greedy(weight, values, full, scale, zero_point)
        ours = ldlq_quantize(weight, hessian, bits=3, greedy_passes=passes).dequantize()
        torch.testing.assert_close(ours, values)
        losses.append(hessian_loss(weight, ours, full).item())
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < losses[0]


def test_greedy_passes_over_several_blocks_never_raise_the_loss() -> None:
    weight, hessian = drawn(3, 300)
    full = damped(hessian, 0.01)
    losses = [
        hessian_loss(
            weight,
            ldlq_quantize(weight, hessian, bits=2, greedy_passes=passes).dequantize(),
            full,
        ).item()
        for passes in (0, 1, 2, 50, 60)
    ]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(losses))
    assert losses[1] < losses[0]


def test_stochastic_rounding_keeps_the_mean() -> None:
    weight = torch.tensor([[0.3, 1.75], [2.9, 1.0]], dtype=torch.float64)
    grid = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    draws = 4000
    total = torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(draws):
        total += ldlq_quantize(
            weight,
            torch.eye(2),
            bits=2,
            grid=grid,
            rounding="stochastic",
            generator=generator,
        ).dequantize()
    spread = (weight % 1 * (1 - weight % 1)).sqrt() / math.sqrt(draws)
    assert ((total / draws - weight).abs() <= 5 * spread + 1e-12).all()
    assert ((weight.round() - weight).abs() > 5 * spread).any()  # rounding to nearest fails


def test_generators_decide() -> None:
    weight, hessian = drawn()

    def codes(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return ldlq_quantize(weight, hessian, rounding="stochastic", generator=generator).codes

    assert torch.equal(codes(3), codes(3))
    assert not torch.equal(codes(3), codes(4))


def test_arguments_are_left_alone() -> None:
    weight, hessian = drawn()
    before = weight.clone(), hessian.clone()
    grid = fit_grid(weight)
    kept = tuple(part.clone() for part in grid)
    ldlq_quantize(weight, hessian, grid=grid, greedy_passes=2)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    assert all(torch.equal(one, other) for one, other in zip(grid, kept, strict=True))
