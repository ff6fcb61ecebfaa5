"""The better of two axes, by the layer's own output."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.quant import adadim_quantize, rtn_quantize


def drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(7, 9, dtype=torch.float64, generator=generator)
    return weight, torch.randn(13, 9, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("outlier", ["column", "none"])
def test_the_smaller_error_wins(bits: int, size: int | None, outlier: str) -> None:
    weight, input = drawn()
    if outlier == "column":
        weight[:, 2] *= 30
    else:
        weight *= torch.logspace(0, 2, 7, dtype=torch.float64).unsqueeze(1)
    options: dict[str, Any] = {"bits": bits, "group_size": size}
    found = adadim_quantize(weight, input, **options)
    if outlier == "column" and (size, bits) == (None, 4):
        assert found.axis == "in"
    errors = {}
    for axis in ("out", "in"):
        fixed = rtn_quantize(weight, axis=axis, **options).dequantize()
        errors[axis] = sum(
            (x @ (fixed[o] - weight[o])).item() ** 2 for x in input for o in range(7)
        )
    assert errors[found.axis] == min(errors.values())
    assert errors["in"] != errors["out"]
    expected = rtn_quantize(weight, axis=found.axis, **options)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dequantize(), expected.dequantize())


def test_equal_errors_are_those_of_rows() -> None:
    assert adadim_quantize(torch.zeros(3, 3), torch.ones(2, 3)).axis == "out"


def test_a_forward_of_the_callers() -> None:
    weight, input = drawn()
    weight[:, 2] *= 30
    seen = []

    def all_but_the_outlier(changed: Tensor) -> Tensor:
        seen.append(changed)
        return torch.cat([changed[:, :2], changed[:, 3:]], 1)

    assert adadim_quantize(weight, input, bits=2, forward=all_but_the_outlier).axis == "in"
    assert len(seen) == 3
    assert torch.equal(seen[0], weight)
    alike = adadim_quantize(weight, input, bits=2, forward=lambda changed: changed[3] * 0)
    assert alike.axis == "out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    weight, input = (tensor.to(dtype) for tensor in drawn())
    found = adadim_quantize(weight, input.reshape(13, 1, 9), mse=True, scheme="symmetric")
    assert found.dequantize().dtype == dtype
    assert found.scale.dtype == torch.float32
