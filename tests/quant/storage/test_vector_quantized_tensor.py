"""What indices into codebooks stand for."""

from typing import Any

import pytest
import torch

from tilework.quant import QuantLinear, VectorQuantizedTensor


def parts(rows: int = 5, columns: int = 4, length: int = 2) -> dict[str, Any]:
    vectors = -(-rows // length)
    return {
        "indices": torch.randint(0, 7, (vectors, columns)),
        "centroids": torch.randn(7, length, dtype=torch.float64),
        "residual_indices": torch.randint(0, 3, (vectors, columns)),
        "residual_centroids": torch.randn(3, length, dtype=torch.float64),
        "column_scale": torch.rand(columns, dtype=torch.float64) + 0.5,
        "column_bias": torch.randn(columns, dtype=torch.float64),
        "shape": torch.Size((rows, columns)),
    }


@pytest.mark.parametrize(
    "without", [(), ("residual_indices", "residual_centroids"), ("column_scale",), ("column_bias",)]
)
@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_values(length: int, without: tuple[str, ...]) -> None:
    given = parts(length=length) | dict.fromkeys(without)
    found = VectorQuantizedTensor(**given, dtype=torch.float64)
    values = found.dequantize()
    assert values.shape == found.shape == (5, 4)
    for o in range(5):
        for j in range(4):
            k, d = divmod(o, length)
            value = given["centroids"][given["indices"][k, j], d]
            if given["residual_indices"] is not None:
                value = value + given["residual_centroids"][given["residual_indices"][k, j], d]
            if given["column_scale"] is not None:
                value = value * given["column_scale"][j]
            if given["column_bias"] is not None:
                value = value + given["column_bias"][j]
            assert values[o, j].item() == pytest.approx(value.item())
    bits = 2.807354922 + (1.584962501 if given["residual_indices"] is not None else 0.0)
    assert found.bits_per_weight == found.code_bits == pytest.approx(bits / length)


@pytest.mark.untyped
def test_dtypes_devices_and_layers() -> None:
    found = VectorQuantizedTensor(**parts())
    assert found.dequantize().dtype == torch.float32
    assert found.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert found.to("meta").residual_centroids.is_meta
    assert found.to("meta").shape == (5, 4)
    assert "7 vectors of 2 + 3 vectors of 2" in repr(found)
    layer = QuantLinear(found)
    names = {"indices", "centroids", "residual_indices", "residual_centroids"}
    assert set(layer.state_dict()) == names | {"column_scale", "column_bias"}
    assert layer.indices.dtype == torch.uint8
    assert torch.equal(layer.quantized.indices, found.indices)
    assert torch.equal(layer.weight, found.dequantize())
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(3, 4)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": torch.zeros(3, 4).int()}, TypeError, "indices must be a tensor of int64"),
        ({"indices": torch.zeros(2, 4).long()}, ValueError, r"indices must be of shape \(3, 4\)"),
        ({"indices": torch.full((3, 4), 7)}, ValueError, "indices must be from 0 to 6"),
        ({"indices": torch.full((3, 4), -1)}, ValueError, "indices must be from 0 to 6"),
        ({"centroids": torch.ones(7)}, ValueError, "centroids must be a non-empty matrix"),
        ({"centroids": torch.ones(7, 2).long()}, TypeError, "centroids must be a floating-point"),
        ({"residual_indices": None}, ValueError, "residual_indices and residual_centroids come"),
        ({"residual_centroids": torch.ones(3, 1)}, ValueError, "residual_centroids must be of"),
        ({"residual_indices": torch.full((3, 4), 3)}, ValueError, "residual_indices must be from"),
        ({"column_scale": torch.ones(5)}, ValueError, r"column_scale must be of shape \(4,\)"),
        ({"column_bias": torch.ones(4).long()}, TypeError, "column_bias must be a floating-point"),
        ({"shape": torch.Size((5,))}, ValueError, "shape must be two sizes of at least 1"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating dtype"),
    ],
    ids=str,
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^VectorQuantizedTensor: {message}"):
        VectorQuantizedTensor(**(parts() | change))
