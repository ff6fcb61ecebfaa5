"""The search of thresholds against plain loops."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.quant import SmoothResult, adaptive_smooth_search


def drawn(rows: int = 9, columns: int = 6) -> tuple[Tensor, Tensor]:
    weight = torch.randn(4, columns, dtype=torch.float64)
    input = torch.randn(rows, columns, dtype=torch.float64)
    input[:, 2] = input[:, 2].abs() * 90 + 40
    input[:, 4] = -input[:, 4].abs() * 12
    return weight, input


def rounded(values: list[float], bits: int, symmetric: bool) -> list[float]:
    most = max(map(abs, values)) or 1.0
    if symmetric:
        step, low, high = 2 * most / (2**bits - 1), 0, 2**bits - 1
    else:
        step, low, high = most / (2 ** (bits - 1) - 1), 1, 2**bits - 1
    middle = 2 ** (bits - 1)
    return [step * (min(max(round(v / step + middle), low), high) - middle) for v in values]


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("num", [None, 7])
@pytest.mark.parametrize("activation_bits", [8, 4])
def test_plain_loops(size: int | None, num: int | None, activation_bits: int) -> None:
    weight, input = drawn()
    found = adaptive_smooth_search(
        weight, input, weight_bits=3, activation_bits=activation_bits, group_size=size, num=num
    )
    positive = max(0.0, max(max(row) for row in input.tolist()))
    largest = max(positive, -min(min(row) for row in input.tolist()))
    steps = num or max(100, math.floor(positive / 0.5))
    assert found.losses.shape == (steps + 1,)
    levels = 2 ** (activation_bits - 1) - 1
    best, least = (0.0, None), math.inf
    for k in range(steps + 1):
        t = largest - k * (largest - 0.1) / steps
        scale = [max(1.0, max(column) / t, -min(column) / t) for column in input.T.tolist()]
        rows = []
        for x in input.tolist():
            x = [a / s for a, s in zip(x, scale, strict=True)]
            step = max(map(abs, x)) / levels
            rows.append([round(a / step) * step for a in x])
        weights = []
        for w in weight.tolist():
            w = [a * s for a, s in zip(w, scale, strict=True)]
            groups = [w[i : i + (size or 6)] for i in range(0, 6, size or 6)]
            weights.append([v for g in groups for v in rounded(g, 3, size is not None)])
        pair = torch.tensor(rows, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
        error = (pair[0] @ pair[1].T - input @ weight.T).square().sum(1).mean().item()
        assert found.losses[k].item() == pytest.approx(error, rel=1e-9)
        if error < least:
            best, least = (t, scale), error
    assert found.threshold == pytest.approx(best[0])
    assert found.loss == pytest.approx(least)
    torch.testing.assert_close(found.scale, torch.tensor(best[1], dtype=torch.float64))
    assert (found.scale >= 1).all()


def test_the_first_loss_is_that_without_smoothing() -> None:
    weight, input = drawn()
    found = adaptive_smooth_search(weight, input)
    plain = adaptive_smooth_search(weight, input, num=1)
    torch.testing.assert_close(found.losses[0], plain.losses[0])
    assert found.loss <= found.losses[0]
    assert isinstance(found, SmoothResult)


@pytest.mark.parametrize("size", [0.0, 0.05, 0.0999])
def test_small_inputs_have_one_threshold(size: float) -> None:
    weight = torch.randn(3, 4)
    found = adaptive_smooth_search(weight, torch.full((2, 4), -size))
    assert found.losses.shape == (1,)
    assert torch.equal(found.scale, torch.ones(4))
    assert found.threshold == pytest.approx(size)


def test_equal_losses_take_the_largest_threshold() -> None:
    found = adaptive_smooth_search(torch.zeros(2, 3), torch.randn(4, 3) * 5, num=4)
    assert found.losses.tolist() == [0.0] * 5
    assert torch.equal(found.scale, torch.ones(3))


def test_several_layers_and_a_forward() -> None:
    (first, input), (second, _) = drawn(), drawn()
    both = adaptive_smooth_search([first, second], input, num=5)
    alone = [adaptive_smooth_search(w, input, num=5).losses for w in (first, second)]
    torch.testing.assert_close(both.losses, alone[0] + alone[1])

    def stacked(rows: Tensor, weights: list[Tensor]) -> Tensor:
        return torch.cat([rows @ w.T for w in weights], 1)

    same = adaptive_smooth_search([first, second], input, num=5, forward=stacked)
    torch.testing.assert_close(same.losses, both.losses)
    half = adaptive_smooth_search(first, input, num=5, forward=lambda x, w: x @ w.T / 2)
    torch.testing.assert_close(half.losses, alone[0] / 4)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": []}, ValueError, "weight must be at least one tensor"),
        ({"weight": torch.ones(3)}, ValueError, "weight must be a non-empty matrix"),
        ({"weight": [torch.ones(2, 3), torch.ones(2, 4)]}, ValueError, "weight must be of shape"),
        ({"input": torch.ones(2, 4)}, ValueError, "input must be non-empty of shape"),
        ({"input": torch.full((2, 3), torch.nan)}, ValueError, "input must be finite"),
        ({"weight_bits": 1}, ValueError, "weight_bits must be an int from 2 to 8"),
        ({"activation_bits": 9}, ValueError, "activation_bits must be an int from 2 to 8"),
        ({"group_size": 0}, ValueError, "group_size must be an int of at least 1"),
        ({"num": 0}, ValueError, "num must be an int of at least 1"),
        ({"forward": lambda x, w: 0.0}, TypeError, "forward must be a function that returns"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"weight": torch.ones(2, 3), "input": torch.ones(2, 3)} | change
    with pytest.raises(error, match=rf"^adaptive_smooth_search: {message}"):
        adaptive_smooth_search(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    weight, input = (one.to(dtype) for one in drawn())
    found = adaptive_smooth_search(weight, input.reshape(3, 3, 6), num=3)
    assert found.scale.dtype == found.losses.dtype == torch.float32
