"""Affine grids, against loops over the groups in float64."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.quant import dequantize_affine, fit_grid, quantize_affine

SCHEMES = ("asymmetric", "symmetric", "restricted", "minmax")
LAYOUTS = [("out", None), ("out", 3), ("out", 50), ("in", None), ("in", 2), ("tensor", None)]


def groups(
    shape: tuple[int, int], size: int | None, axis: str
) -> Iterator[tuple[tuple[int, int], list[tuple[int, int]]]]:
    """The place of each grid, and the entries that it is of."""
    rows, columns = shape
    if axis == "tensor":
        yield (0, 0), [(o, j) for o in range(rows) for j in range(columns)]
        return
    lines, length = (rows, columns) if axis == "out" else (columns, rows)
    size = size or length
    for line in range(lines):
        for group, start in enumerate(range(0, length, size)):
            along = range(start, min(start + size, length))
            if axis == "out":
                yield (line, group), [(line, j) for j in along]
            else:
                yield (group, line), [(o, line) for o in along]


def fitted(values: list[float], bits: int, scheme: str) -> tuple[float, float]:
    """By the page, one group."""
    top = 2**bits - 1
    low, high = min(values), max(values)
    if scheme in ("symmetric", "restricted"):
        most = max(abs(low), abs(high)) or 1.0
        if scheme == "symmetric":
            return 2 * most / top, 2 ** (bits - 1)
        return most / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
    if scheme == "asymmetric" or low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high == 0:
        low, high = -1.0, 1.0
    scale = (high - low) / top
    return scale, -low / scale if scheme == "minmax" else round(-low / scale)


def level(
    value: float, scale: float, zero_point: float, bits: int, scheme: str
) -> tuple[int, float]:
    lowest = 1 if scheme == "restricted" else 0
    code = min(max(round(value / scale + zero_point), lowest), 2**bits - 1)
    return code, scale * (code - zero_point)


def drawn() -> Tensor:
    weight = torch.randn(5, 7, dtype=torch.float64)
    weight[0] = weight[0].abs()
    weight[1] = -weight[1].abs()
    weight[2] = 0.0
    weight[3] = 0.25
    return weight


@pytest.mark.parametrize(("axis", "size"), LAYOUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grids_and_codes(axis: str, size: int | None, scheme: str, bits: int) -> None:
    if bits == 1 and scheme in ("symmetric", "restricted"):
        return
    weight = drawn()
    options = {"bits": bits, "group_size": size, "axis": axis, "scheme": scheme}
    scale, zero_point = fit_grid(weight, **options)
    codes = quantize_affine(weight, scale, zero_point, **options)
    values = dequantize_affine(codes, scale, zero_point, group_size=size, axis=axis)
    assert codes.dtype == torch.uint8
    seen = torch.zeros(scale.shape, dtype=torch.bool)
    for place, entries in groups((5, 7), size, axis):
        expected = fitted([weight[entry].item() for entry in entries], bits, scheme)
        assert (scale[place].item(), zero_point[place].item()) == pytest.approx(expected, rel=1e-14)
        seen[place] = True
        for entry in entries:
            code, value = level(weight[entry].item(), *expected, bits, scheme)
            assert codes[entry] == code
            assert values[entry].item() == pytest.approx(value, rel=1e-13, abs=1e-14)
            assert abs(value - weight[entry].item()) <= expected[0] / 2 * (1 + 1e-12)
    assert seen.all()
    assert torch.equal(quantize_affine(values, scale, zero_point, **options), codes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranges_are_narrowed_where_that_is_better(scheme: str) -> None:
    weight = torch.randn(3, 20, dtype=torch.float64) ** 3
    options = {"bits": 3, "group_size": 8, "scheme": scheme}
    wide, zero_point = fit_grid(weight, **options)
    narrow, same = fit_grid(weight, **options, mse=True)
    assert torch.equal(zero_point, same)
    for place, entries in groups((3, 20), 8, "out"):
        errors = []
        for k in range(80):
            scale = (1 - k / 100) * wide[place].item()
            pairs = [
                (
                    weight[entry].item(),
                    level(weight[entry].item(), scale, same[place].item(), 3, scheme)[1],
                )
                for entry in entries
            ]
            errors.append(math.fsum(abs(a - b) ** 2.4 for a, b in pairs))
        best = errors.index(min(errors))
        assert narrow[place].item() == pytest.approx(
            (1 - best / 100) * wide[place].item(), rel=1e-12
        )
    assert (narrow < wide).any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mse", [False, True])
def test_columns_are_rows_of_the_transpose(scheme: str, mse: bool) -> None:
    weight = drawn()
    options = {"bits": 3, "group_size": 2, "scheme": scheme, "mse": mse}
    for one, other in zip(
        fit_grid(weight, axis="in", **options), fit_grid(weight.T, **options), strict=True
    ):
        assert torch.equal(one, other.T)
        assert one.is_contiguous()


@given(st.floats(1e-20, 1e20), st.sampled_from(SCHEMES), st.integers(2, 8))
def test_scales_follow_the_weights(factor: float, scheme: str, bits: int) -> None:
    weight = torch.randn(2, 9, dtype=torch.float64)
    options = {"bits": bits, "scheme": scheme}
    scale, zero_point = fit_grid(weight, **options)
    scaled, same = fit_grid(factor * weight, **options)
    torch.testing.assert_close(scaled, factor * scale, rtol=1e-13, atol=0)
    torch.testing.assert_close(same, zero_point, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 6).to(dtype)
    before = weight.clone()
    scale, zero_point = fit_grid(weight.requires_grad_(), group_size=4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert scale.dtype == zero_point.dtype == wide
    assert not scale.requires_grad
    exact = fit_grid(weight.detach().to(wide), group_size=4)
    assert torch.equal(scale, exact[0])
    codes = quantize_affine(weight, scale, zero_point, group_size=4)
    assert torch.equal(codes, quantize_affine(weight.to(wide), scale, zero_point, group_size=4))
    assert dequantize_affine(codes, scale, zero_point, group_size=4).dtype == wide
    assert torch.equal(weight, before)


def test_the_widest_tensor_says_what_is_computed_in() -> None:
    weight, third = torch.tensor([[1.0]]), torch.tensor([[1 / 3]], dtype=torch.float64)
    zero = torch.zeros(1, 1)
    # 1 / third is a little below 3 in float64, where 0.5 more is a tie no longer.
    half = torch.tensor([[-0.5]], dtype=torch.float64)
    assert quantize_affine(weight, third, half) == round(1 / (1 / 3) - 0.5)
    assert quantize_affine(weight, third, zero) == 3


def test_agrees_with_pytorch_away_from_ties() -> None:
    weight = torch.randn(6, 11)
    scale, zero_point = fit_grid(weight, bits=5)
    ours = dequantize_affine(quantize_affine(weight, scale, zero_point, bits=5), scale, zero_point)
    theirs = torch.fake_quantize_per_channel_affine(
        weight, scale.squeeze(1), zero_point.squeeze(1).int(), 0, 0, 31
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_strides_do_not_matter() -> None:
    weight = torch.randn(8, 6)
    for view in (weight.T, weight[::2], weight[:, ::3]):
        for one, other in zip(fit_grid(view), fit_grid(view.contiguous()), strict=True):
            assert torch.equal(one, other)


def test_levels_have_gradients() -> None:
    codes = torch.tensor([[0, 1, 3]])
    scale = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    zero_point = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda s, z: dequantize_affine(codes, s, z), (scale, zero_point))
