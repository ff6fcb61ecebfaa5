"""SpQR against plain loops with explicit elimination, and what it promises."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.quant import SpQRTensor, gptq_quantize, hessian_loss, rtn_quantize, spqr_quantize

from quant.rounding.problems import damped, drawn, eliminated

Grid = tuple[float, float]


def fit(values: list[float], bits: int, scheme: str) -> Grid:
    """A grid of one group, by the page."""
    low, high = min(values), max(values)
    if scheme == "asymmetric" or low == high:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high == 0:
        low, high = -1.0, 1.0
    step = (high - low) / (2**bits - 1)
    zero = -low / step
    return step, float(round(zero)) if scheme == "asymmetric" else zero


def level(value: float, grid: Grid, bits: int) -> tuple[int, float]:
    step, zero = grid
    code = min(max(round(value / step + zero), 0), 2**bits - 1)
    return code, step * (code - zero)


def again(values: list[float], bits: int | None, run: int) -> list[float]:
    """Statistics, quantized in runs."""
    if bits is None:
        return values
    result = []
    for start in range(0, len(values), run):
        part = values[start : start + run]
        grid = fit(part, bits, "minmax")
        result += [level(value, grid, bits)[1] for value in part]
    return result


class Plain:
    """The page's sweep, value by value."""

    def __init__(self, weight: Tensor, hessian: Tensor, damp: float, **options: Any) -> None:
        self.bits, self.size, self.scheme = (
            options["bits"],
            options["group_size"],
            options["scheme"],
        )
        self.options = options
        rows, columns = weight.shape
        diagonal = hessian.diagonal()
        order = list(range(columns))
        if options["act_order"]:
            order = sorted(order, key=lambda j: -diagonal[j].item())
        matrix = damped(hessian, damp)[order][:, order]
        self.weight = weight[:, order].clone()
        for j, place in enumerate(order):
            if diagonal[place] == 0:
                self.weight[:, j] = 0
        inverse, costs = torch.linalg.inv(matrix), []
        for j in range(columns):
            costs.append(1 / inverse[j, j].item())
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        self.costs = costs
        variances = [self.weight[:, j].var().item() if rows > 1 else 0.0 for j in range(columns)]
        mean = sum(v * c for v, c in zip(variances, costs, strict=True)) / columns
        threshold = options["outlier_threshold"]
        self.limit = threshold * mean if threshold < math.inf else math.inf
        self.codes = torch.zeros(rows, columns, dtype=torch.uint8)
        self.values, self.mask = torch.zeros_like(weight), torch.zeros(rows, columns).bool()
        eliminated(self.weight, matrix, self.rule)
        back = torch.tensor(order).argsort()
        self.codes, self.values, self.mask = (
            one[:, back] for one in (self.codes, self.values, self.mask)
        )

    def cost(self, values: list[float], costs: list[float]) -> float:
        grid = fit(values, self.bits, self.scheme)
        pairs = zip(values, costs, strict=True)
        return sum((level(v, grid, self.bits)[1] - v) ** 2 * c for v, c in pairs)

    def cleaned(self, values: list[float], costs: list[float]) -> list[float]:
        if not self.options["leave_one_out"] or self.limit == math.inf or len(values) == 1:
            return values
        whole = self.cost(values, costs)
        without = [
            self.cost(values[:i] + values[i + 1 :], costs[:i] + costs[i + 1 :])
            for i in range(len(values))
        ]
        others = [i for i, one in enumerate(without) if not whole - one > self.limit]
        mean = sum(values[i] for i in others) / len(others) if others else 0.0
        return [v if i in others else mean for i, v in enumerate(values)]

    def rule(self, position: int, current: Tensor) -> Tensor:
        if position % self.size == 0:
            end = min(position + self.size, current.shape[1])
            costs = self.costs[position:end]
            grids = [
                fit(self.cleaned(row, costs), self.bits, self.scheme)
                for row in current[:, position:end].tolist()
            ]
            run = self.options["statistics_group_size"]
            scales = again([g[0] for g in grids], self.options["scale_bits"], run)
            zeros = again([g[1] for g in grids], self.options["zero_bits"], run)
            self.grids = list(zip(scales, zeros, strict=True))
        for o, value in enumerate(current[:, position].tolist()):
            code, found = level(value, self.grids[o], self.bits)
            if (value - found) ** 2 * self.costs[position] > self.limit:
                code, found = level(0.0, self.grids[o], self.bits)[0], value
                self.mask[o, position] = True
            self.codes[o, position] = code
            self.values[o, position] = found
        return self.values[:, position]


OPTIONS: dict[str, Any] = {
    "bits": 3,
    "group_size": 5,
    "scheme": "minmax",
    "act_order": False,
    "outlier_threshold": 0.06,
    "scale_bits": 3,
    "zero_bits": 4,
    "statistics_group_size": 4,
    "leave_one_out": True,
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"act_order": True},
        {"leave_one_out": False},
        {"scale_bits": None},
        {"zero_bits": None},
        {"scheme": "asymmetric", "bits": 2},
        {"outlier_threshold": 0.02},
        {"outlier_threshold": math.inf},
        {"group_size": 1},
        {"group_size": 23},
        {"statistics_group_size": 1},
    ],
    ids=str,
)
def test_plain_loops(change: dict[str, Any]) -> None:
    options = OPTIONS | change
    weight, hessian = drawn()
    weight[2, 3], weight[4, 11] = 9.0, -8.0
    hessian[:, 6] = hessian[6] = 0
    found = spqr_quantize(weight, hessian, damp=0.02, **options)
    plain = Plain(weight, hessian, 0.02, **options)
    assert torch.equal(found.outlier_mask, plain.mask)
    assert torch.equal(found.codes[~plain.mask], plain.codes[~plain.mask])
    apart = found.codes.int() - plain.codes.int()  # 0 may lie in the middle of two levels
    assert apart.abs().max() <= 1
    torch.testing.assert_close(found.dequantize(), plain.values)
    assert plain.mask.sum() < weight.numel()


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric", "restricted", "minmax"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("size", [None, 4, 16])
def test_without_outliers_and_second_level_it_is_gptq(
    scheme: str, act_order: bool, size: int | None
) -> None:
    weight, hessian = drawn()
    options: dict[str, Any] = {"group_size": size, "scheme": scheme, "act_order": act_order}
    found = spqr_quantize(
        weight, hessian, outlier_threshold=math.inf, scale_bits=None, zero_bits=None, **options
    )
    expected = gptq_quantize(weight, hessian, bits=3, scales="fresh", **options)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dequantize(), expected.dequantize())
    assert found.group_size == size
    assert (found.group_index is None) == (expected.group_index is None)
    assert len(found.outlier_values) == 0
    assert found.scale_quantized is found.zero_quantized is None


@pytest.mark.parametrize("size", [3, 16, 40])
def test_blocks_change_nothing(size: int) -> None:
    weight, hessian = drawn(8, 37)
    results = [
        spqr_quantize(weight, hessian, group_size=size, block_size=block)
        for block in (1, 7, 16, 128)
    ]
    for other in results[1:]:
        assert torch.equal(results[0].codes, other.codes)
        assert torch.equal(results[0].outlier_mask, other.outlier_mask)
        torch.testing.assert_close(results[0].dequantize(), other.dequantize())


def test_a_threshold_of_zero_keeps_all_weights() -> None:
    weight, hessian = drawn()
    found = spqr_quantize(weight, hessian, outlier_threshold=0.0)
    torch.testing.assert_close(found.dequantize(), weight, rtol=1e-12, atol=1e-12)
    counts = [
        len(spqr_quantize(weight, hessian, outlier_threshold=t).outlier_values)
        for t in (0.02, 0.2, 2.0, math.inf)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2]
    assert counts[3] == 0


def test_outliers_are_in_rising_order() -> None:
    weight, hessian = drawn(7, 30)
    found = spqr_quantize(weight, hessian, outlier_threshold=0.1, act_order=True)
    offsets, columns = found.outlier_offsets.tolist(), found.outlier_columns.tolist()
    assert offsets[0] == 0
    assert offsets[-1] == len(columns) == len(found.outlier_values)
    for o in range(7):
        row = columns[offsets[o] : offsets[o + 1]]
        assert row == sorted(set(row))
        assert found.outlier_mask[o].nonzero().squeeze(1).tolist() == row
        values = found.outlier_values[offsets[o] : offsets[o + 1]]
        assert torch.equal(found.dequantize()[o, row], values)


def test_statistics_are_codes_of_their_own() -> None:
    weight, hessian = drawn(7, 10)
    found = spqr_quantize(weight, hessian, group_size=4, statistics_group_size=3, scale_bits=2)
    assert len(found.scale_quantized) == len(found.zero_quantized) == 3
    for group, (codes, scale, zero) in enumerate(found.scale_quantized):
        assert codes.shape == (7,)
        assert codes.max() <= 3
        values = scale.repeat_interleave(3)[:7] * (codes.double() - zero.repeat_interleave(3)[:7])
        assert torch.equal(values, found.scale[:, group])
    moved = found.to("cpu")
    assert torch.equal(moved.dequantize(), found.dequantize())
    assert all(one.is_meta for one in found.to("meta").scale_quantized[0])


def test_it_beats_gptq_on_the_same_grid_in_aggregate() -> None:
    total, plain, nearest = 0.0, 0.0, 0.0
    for _ in range(5):
        weight, hessian = drawn(16, 48)
        weight[torch.rand_like(weight) < 0.02] *= 6
        options: dict[str, Any] = {"bits": 3, "group_size": 16, "scheme": "minmax"}
        results = (
            spqr_quantize(weight, hessian, **options),
            gptq_quantize(weight, hessian, **options),
            rtn_quantize(weight, **options),
        )
        losses = [hessian_loss(weight, one.dequantize(), hessian).item() for one in results]
        total, plain, nearest = total + losses[0], plain + losses[1], nearest + losses[2]
    assert total < plain < nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_single_rows(dtype: torch.dtype) -> None:
    weight, hessian = drawn(1, 5)
    weight = weight.to(dtype)
    found = spqr_quantize(weight, hessian.float())
    assert isinstance(found, SpQRTensor)
    assert found.dequantize().dtype == dtype
    assert found.outlier_values.dtype == found.scale.dtype == torch.float32
    torch.testing.assert_close(found.dequantize(), weight)  # of one row, the limit is 0
    one = spqr_quantize(torch.tensor([[3.0]]), torch.ones(1, 1))
    assert one.dequantize().item() == 3.0


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"outlier_offsets": None}, TypeError, "outlier_offsets must be a tensor of int64"),
        ({"outlier_columns": torch.zeros(1).int()}, TypeError, "outlier_columns must be a tensor"),
        ({"outlier_values": torch.ones(1).long()}, TypeError, "outlier_values must be a floating"),
        (
            {"outlier_offsets": torch.tensor([0, 1])},
            ValueError,
            r"outlier_offsets must be of shape",
        ),
        ({"outlier_offsets": torch.tensor([0, 1, 2])}, ValueError, "outlier_offsets must rise"),
        ({"outlier_offsets": torch.tensor([0, 2, 1])}, ValueError, "outlier_offsets must rise"),
        ({"outlier_columns": torch.tensor([3])}, ValueError, "outlier_columns must be from 0 to 2"),
        ({"outlier_columns": torch.tensor([-1])}, ValueError, "outlier_columns must be from 0"),
        ({"outlier_values": torch.ones(2)}, ValueError, r"outlier_columns must be of shape \(2,\)"),
    ],
    ids=str,
)
def test_a_tensor_of_what_does_not_fit(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {
        "codes": torch.zeros(2, 3, dtype=torch.uint8),
        "scale": torch.ones(2, 1),
        "zero_point": torch.ones(2, 1),
        "bits": 2,
        "outlier_offsets": torch.tensor([0, 0, 1]),
        "outlier_columns": torch.tensor([2]),
        "outlier_values": torch.tensor([7.0]),
    }
    assert SpQRTensor(**given).dequantize().tolist() == [[-1.0] * 3, [-1.0, -1.0, 7.0]]
    with pytest.raises(error, match=rf"^SpQRTensor: {message}"):
        SpQRTensor(**(given | change))
