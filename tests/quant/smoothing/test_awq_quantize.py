"""AWQ's searches against plain loops, and what they promise."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.quant import (
    AWQScale,
    QuantizedTensor,
    awq_quantize,
    awq_search_clip,
    awq_search_scale,
    rtn_quantize,
)


def drawn(rows: int = 5, columns: int = 11, count: int = 17) -> tuple[Tensor, Tensor]:
    """Weights and inputs with channels of very different size."""
    sizes = torch.logspace(-1, 1, columns, dtype=torch.float64)[torch.randperm(columns)]
    weight = torch.randn(rows, columns, dtype=torch.float64)
    return weight, torch.randn(count, columns, dtype=torch.float64) * sizes


def nearest(weight: list[float], bits: int, low: float, high: float) -> list[float]:
    """To levels of an asymmetric grid, half to even."""
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high == 0:
        low, high = -1.0, 1.0
    step = (high - low) / (2**bits - 1)
    zero = round(-low / step)
    return [step * (min(max(round(w / step + zero), 0), 2**bits - 1) - zero) for w in weight]


def rounded(weight: Tensor, bits: int, size: int) -> Tensor:
    rows = []
    for row in weight.tolist():
        groups = [row[start : start + size] for start in range(0, len(row), size)]
        rows.append([v for g in groups for v in nearest(g, bits, min(g), max(g))])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("size", [3, 4, 11])
def test_scales_are_those_of_a_plain_search(size: int) -> None:
    weight, input = drawn()
    found = awq_search_scale(weight, input, bits=3, group_size=size, grid=7)
    means = [sum(abs(x) for x in column) / 17 for column in input.T.tolist()]
    best, least = None, math.inf
    for k in range(7):
        powers = [max(m ** (k / 7), 1e-4) for m in means]
        root = math.sqrt(max(powers) * min(powers))
        t = torch.tensor([p / root for p in powers], dtype=torch.float64)
        change = input @ (rounded(weight * t, 3, size) / t - weight).T
        error = change.square().mean().item()
        assert found.errors[k].item() == pytest.approx(error, rel=1e-9)
        if error < least:
            best, least = (k / 7, t), error
    assert best is not None
    assert found.alpha == best[0]
    torch.testing.assert_close(found.scale, best[1])


def test_several_layers_and_a_block() -> None:
    (first, input), (second, _) = drawn(), drawn(rows=2)
    together = awq_search_scale([first, second], input, bits=2, group_size=4)

    def outputs(weights: list[Tensor]) -> Tensor:
        return torch.cat([input @ weight.T for weight in weights], -1)

    block = awq_search_scale([first, second], input, bits=2, group_size=4, forward=outputs)
    torch.testing.assert_close(together.errors, block.errors)
    assert together.alpha == block.alpha
    alone = [awq_search_scale(w, input, bits=2, group_size=4).errors for w in (first, second)]
    torch.testing.assert_close(together.errors, (5 * alone[0] + 2 * alone[1]) / 7)

    def squared(weights: list[Tensor]) -> Tensor:
        return (input @ weights[0].T).square()

    found = awq_search_scale(first, input, bits=2, group_size=4, grid=3, forward=squared)
    plain = rtn_quantize(first, bits=2, group_size=4).dequantize()
    expected = (squared([plain]) - squared([first])).square().mean()
    torch.testing.assert_close(found.errors[0], expected)


def test_the_first_error_is_plain_rounding_and_none_is_chosen_above_it() -> None:
    weight, input = drawn()
    for bits in (2, 3, 4):
        found = awq_search_scale(weight, input, bits=bits, group_size=4)
        plain = rtn_quantize(weight, bits=bits, group_size=4).dequantize()
        torch.testing.assert_close(found.errors[0], (input @ (plain - weight).T).square().mean())
        assert found.errors[round(found.alpha * 20)] == found.errors.min()
        assert isinstance(found, AWQScale)
        assert found.errors.shape == (20,)


def test_the_unit_of_inputs_does_not_matter() -> None:
    weight, input = drawn()
    first = awq_search_scale(weight, input, bits=2, group_size=4)
    second = awq_search_scale(weight, 64.0 * input, bits=2, group_size=4)
    assert first.alpha == second.alpha
    torch.testing.assert_close(first.scale, second.scale)


def test_equal_errors_take_the_smallest_exponent() -> None:
    input = torch.tensor([[1.0, 4.0]])
    found = awq_search_scale(torch.zeros(2, 2), input, grid=5)
    assert (found.alpha, found.errors.tolist()) == (0.0, [0.0] * 5)
    clip = awq_search_clip(torch.zeros(2, 2), input)
    assert torch.equal(clip, torch.zeros(2, 1))
    weight, input = drawn()
    clip = awq_search_clip(weight, 0 * input, bits=2, group_size=None)
    assert torch.equal(clip, weight.abs().amax(1, keepdim=True))


def test_a_channel_that_is_never_on_has_a_finite_scale() -> None:
    weight, input = drawn()
    input[:, 3] = 0
    found = awq_search_scale(weight, input, bits=2, group_size=4)
    assert found.scale.isfinite().all()
    assert (found.scale > 0).all()
    assert awq_quantize(weight, input, bits=2, group_size=4).dequantize().isfinite().all()


@pytest.mark.parametrize(
    ("size", "tokens", "stride"), [(3, 512, 1), (4, 6, 2), (11, 17, 1), (2, 1, 17)]
)
def test_magnitudes_are_those_of_a_plain_search(size: int, tokens: int, stride: int) -> None:
    weight, input = drawn()
    found = awq_search_clip(
        weight, input, bits=2, group_size=size, grid=8, max_shrink=0.7, max_tokens=tokens
    )
    groups = -(-11 // size)
    assert found.shape == (5, groups)
    used = [input[i].tolist() for i in range(0, 17, stride)]
    shrunk = 0
    for o in range(5):
        for g in range(groups):
            columns = range(g * size, min((g + 1) * size, 11))
            w = [weight[o, c].item() for c in columns]
            most = max(map(abs, w))
            best, least = most, math.inf
            for k in range(5):  # floor(0.7 * 8)
                c = most * (1 - k / 8)
                clamped = [min(max(v, -c), c) for v in w]
                values = nearest(clamped, 2, min(clamped), max(clamped))
                error = 0.0
                for x in used:
                    dot = sum(x[i] * (values[n] - w[n]) for n, i in enumerate(columns))
                    error += dot * dot
                if error < least * (1 - 1e-12):
                    best, least = c, error
            shrunk += best < most
            assert found[o, g].item() == pytest.approx(best)
            assert (1 - 0.7) * most <= found[o, g] <= most
    assert shrunk or size == 2


def test_a_grid_of_one_clips_nothing() -> None:
    weight, input = drawn()
    clip = awq_search_clip(weight, input, grid=1, group_size=None)
    torch.testing.assert_close(clip, weight.abs().amax(1, keepdim=True))
    assert awq_quantize(weight, input, grid=1).shape == weight.shape


@pytest.mark.parametrize("clip", [False, True])
def test_the_quantizer_is_made_of_the_searches(clip: bool) -> None:
    weight, input = drawn()
    options: dict[str, Any] = {"bits": 3, "group_size": 4}
    quantized = awq_quantize(weight, input, clip=clip, max_tokens=6, grid=9, **options)
    t = awq_search_scale(weight, input, grid=9, **options).scale
    scaled = weight * t
    if clip:
        limit = awq_search_clip(scaled, input / t, grid=9, max_tokens=6, **options)
        for o in range(5):
            for j in range(11):
                c = limit[o, j // 4].item()
                scaled[o, j] = min(max(scaled[o, j].item(), -c), c)
    assert torch.equal(quantized.input_scale, t)
    torch.testing.assert_close(quantized.dequantize(), rounded(scaled, 3, 4) / t)
    error = (input @ (quantized.dequantize() - weight).T).square().mean()
    plain = rtn_quantize(weight, **options).dequantize()
    assert error < (input @ (plain - weight).T).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_shapes(dtype: torch.dtype) -> None:
    weight, input = drawn()
    weight, input = weight.to(dtype), input.to(dtype).reshape(17, 1, 11)
    before = weight.clone()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    quantized = awq_quantize(weight, input, bits=4, group_size=4)
    assert isinstance(quantized, QuantizedTensor)
    assert quantized.dequantize().dtype == dtype
    assert quantized.scale.dtype == quantized.input_scale.dtype == wide
    assert torch.equal(weight, before)
    one = awq_quantize(torch.tensor([[2.0]], dtype=dtype), torch.tensor([[3.0]], dtype=dtype))
    assert one.dequantize().item() == 2.0
