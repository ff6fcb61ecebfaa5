"""Codes of rows of activations, value by value."""

import pytest
import torch

from tilework.quant import quantize_activation

import samples
from calls import Call, draw


@samples.of(Call)
def calls() -> list[Call]:
    return [Call(quantize_activation, lambda: {"input": draw(4, 3)}, options=({"bits": 5},))]


@pytest.mark.parametrize("bits", range(2, 9))
def test_values(bits: int) -> None:
    input = torch.randn(2, 3, 5, dtype=torch.float64)
    input[1, 2] = 0
    codes, scale = quantize_activation(input, bits=bits)
    assert codes.dtype == torch.int8
    assert (codes.shape, scale.shape) == ((2, 3, 5), (2, 3, 1))
    for i in range(2):
        for j in range(3):
            row = input[i, j].tolist()
            step = max(map(abs, row)) / (2 ** (bits - 1) - 1) or 1.0
            assert scale[i, j].item() == pytest.approx(step)
            assert codes[i, j].tolist() == [round(x / step) for x in row]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_shapes(dtype: torch.dtype) -> None:
    codes, scale = quantize_activation(torch.randn(3, 4).to(dtype).requires_grad_())
    assert scale.dtype == torch.float32
    assert not scale.requires_grad
    assert codes.abs().amax(1).tolist() == [127] * 3
    assert quantize_activation(torch.ones(0, 4).to(dtype))[0].shape == (0, 4)
    assert quantize_activation(torch.tensor([2.0]))[0].item() == 127


@pytest.mark.untyped
def test_compiles_in_one_graph() -> None:
    compiled = torch.compile(quantize_activation, fullgraph=True, backend="eager")
    x = torch.randn(3, 4)
    for found, expected in zip(compiled(x), quantize_activation(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"bits": 1}, ValueError, "bits must be an int from 2 to 8"),
        ({"bits": 9}, ValueError, "bits must be an int from 2 to 8"),
        ({"bits": True}, TypeError, "bits must be an int"),
        ({"input": torch.ones(2, 0)}, ValueError, "input must be of shape"),
        ({"input": torch.tensor(1.0)}, ValueError, "input must be of shape"),
        ({"input": torch.ones(2).long()}, TypeError, "input must be a floating-point tensor"),
        ({"input": torch.tensor([torch.inf])}, ValueError, "input must be finite"),
        ({"input": torch.tensor([torch.nan])}, ValueError, "input must be finite"),
    ],
    ids=str,
)
def test_refusals(given: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^quantize_activation: {message}"):
        quantize_activation(**({"input": torch.ones(2)} | given))  # type: ignore[arg-type]
