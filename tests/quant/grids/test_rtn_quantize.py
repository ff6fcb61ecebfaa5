"""Rounding to nearest: the grid of ``fit_grid`` or another, and its codes."""

from typing import Any

import pytest
import torch

from tilework.quant import fit_grid, quantize_affine, rtn_quantize


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 3, "group_size": 4, "scheme": "minmax"},
        {"bits": 2, "group_size": 2, "axis": "in", "scheme": "restricted", "mse": True},
        {"bits": 8, "axis": "tensor", "scheme": "symmetric"},
    ],
)
def test_codes_of_the_fitted_grid(options: dict[str, Any], dtype: torch.dtype) -> None:
    weight = torch.randn(5, 7).to(dtype)
    quantized = rtn_quantize(weight, **options)
    scale, zero_point = fit_grid(weight, **options)
    rest = {name: value for name, value in options.items() if name != "mse"}
    assert torch.equal(quantized.scale, scale)
    assert torch.equal(quantized.zero_point, zero_point)
    assert torch.equal(quantized.codes, quantize_affine(weight, scale, zero_point, **rest))
    assert quantized.bits == options.get("bits", 4)
    assert quantized.axis == options.get("axis", "out")
    assert quantized.group_size == options.get("group_size")
    assert quantized.dequantize().dtype == dtype
    error = (quantized.dequantize(torch.float64) - weight.double()).abs().max()
    assert error <= scale.double().max() * (0.5 if "mse" not in options else 4) * 1.001


def test_a_grid_that_is_given() -> None:
    weight = torch.tensor([[0.2, 1.1, 9.0], [-1.0, 0.6, 0.4]])
    grid = torch.tensor([[1.0], [0.5]], dtype=torch.float64), torch.tensor([[0.0], [2.0]])
    quantized = rtn_quantize(weight, bits=2, grid=grid)
    assert quantized.codes.tolist() == [[0, 1, 3], [0, 3, 3]]
    assert quantized.scale.dtype == quantized.zero_point.dtype == torch.float64
    assert quantized.dequantize().tolist() == [[0.0, 1.0, 3.0], [-1.0, 0.5, 0.5]]


def test_restricted_grids_never_use_the_code_zero() -> None:
    grid = torch.ones(1, 1), torch.full((1, 1), 2.0)
    weight = torch.tensor([[-9.0, 9.0]])
    quantized = rtn_quantize(weight, bits=2, scheme="restricted", grid=grid)
    assert quantized.codes.tolist() == [[1, 3]]
