"""Exact products of integers."""

import pytest
import torch
from torch import Tensor

from tilework.quant import W4A8Tensor, w4a8_linear, w4a8_quantize

import samples
from calls import Call, draw


def product(input: Tensor) -> Tensor:
    codes = torch.arange(15, dtype=torch.uint8, device=input.device).reshape(5, 3)
    scale = torch.linspace(0.1, 2.0, 5, dtype=torch.float64, device=input.device)
    return w4a8_linear(input, W4A8Tensor(codes, None, scale.unsqueeze(1)))


@samples.of(Call)
def calls() -> list[Call]:
    return [Call(w4a8_linear, lambda: {"input": draw(4, 3)}, by=product, sizes={3: 3})]


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_products_are_exact(size: int | None, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(5, 11), torch.randn(5).to(dtype)
    weights = w4a8_quantize(weight, group_size=size)
    for shape in [(11,), (3, 11), (2, 0, 11), (2, 3, 11)]:
        x = torch.randn(shape).to(dtype)
        output = w4a8_linear(x, weights, bias)
        assert (output.shape, output.dtype) == ((*shape[:-1], 5), dtype)
        rows = x.double().reshape(-1, 11)
        steps = rows.abs().amax(1, keepdim=True) / 127 if len(rows) else rows[:, :1]
        rounded = (rows / steps).round() * steps
        exact = (rounded @ weights.dequantize().double().mT + bias.double()).reshape(output.shape)
        eps = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-6
        torch.testing.assert_close(output.double(), exact, rtol=8 * eps, atol=8 * eps)


def test_integers_do_not_overflow_in_long_rows() -> None:
    columns = 300_001
    codes = torch.zeros(1, columns, dtype=torch.uint8)
    scale = torch.full((1, 1), 16.0)
    weights = W4A8Tensor(codes, scale, torch.ones(1, 1), columns)
    assert torch.equal(weights.int8_weight(), torch.full((1, columns), -128, dtype=torch.int8))
    output = w4a8_linear(torch.full((2, columns), 127.0, dtype=torch.float64), weights)
    assert output.tolist() == [[-127.0 * 128 * columns]] * 2


@pytest.mark.untyped
def test_compiled_and_exported() -> None:
    weights = w4a8_quantize(torch.randn(5, 11), group_size=4)
    x = torch.randn(3, 11)
    expected = w4a8_linear(x, weights)
    compiled = torch.compile(lambda x: w4a8_linear(x, weights), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)

    class Layer(torch.nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return w4a8_linear(input, weights)

    rows = torch.export.Dim("rows")
    program = torch.export.export(Layer(), (x,), dynamic_shapes={"input": {0: rows}})
    more = torch.randn(7, 11)
    torch.testing.assert_close(program.module()(more), w4a8_linear(more, weights))


@pytest.mark.untyped
def test_refusals_of_the_product() -> None:
    weights = w4a8_quantize(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"^w4a8_linear: input must be of shape \(..., 3\)"):
        w4a8_linear(torch.ones(2, 4), weights)
    with pytest.raises(TypeError, match=r"^w4a8_linear: input must be a floating-point tensor"):
        w4a8_linear(torch.ones(2, 3).long(), weights)
    with pytest.raises(TypeError, match=r"^w4a8_linear: quantized must be a W4A8Tensor"):
        w4a8_linear(torch.ones(2, 3), torch.ones(2, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^w4a8_linear: bias must be of shape \(2,\)"):
        w4a8_linear(torch.ones(2, 3), weights, torch.ones(3))
