"""What codes stand for, with everything that may be done to weights before."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.quant import QuantizedTensor, pack_codes, rtn_quantize


class Doubled:
    def inverse(self, weight: Tensor) -> Tensor:
        return weight / 2

    def to(self, device: torch.device | str) -> "Doubled":
        return self


def parts() -> dict[str, Any]:
    return {
        "codes": torch.randint(0, 8, (3, 5), dtype=torch.uint8),
        "scale": torch.rand(3, 2, dtype=torch.float64),
        "zero_point": torch.randn(3, 2, dtype=torch.float64),
        "bits": 3,
        "group_size": 4,
    }


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"group_index": torch.tensor([1, 0, 0, 1, 1])},
        {"input_scale": torch.tensor([1.0, 2.0, 4.0, 0.5, 3.0], dtype=torch.float64)},
        {"transform": Doubled()},
        {
            "group_index": torch.tensor([0, 0, 1, 0, 1]),
            "input_scale": torch.tensor([1.0, 2.0, 4.0, 0.5, 3.0], dtype=torch.float64),
            "transform": Doubled(),
        },
    ],
)
def test_values(more: dict[str, Any]) -> None:
    given = parts()
    quantized = QuantizedTensor(**given, **more, dtype=torch.float64)
    values = quantized.dequantize()
    assert values.shape == quantized.shape == (3, 5)
    for o in range(3):
        for j in range(5):
            group = int(more["group_index"][j]) if "group_index" in more else j // 4
            value = given["scale"][o, group].item() * (
                given["codes"][o, j].item() - given["zero_point"][o, group].item()
            )
            if "input_scale" in more:
                value /= more["input_scale"][j].item()
            if "transform" in more:
                value /= 2
            assert values[o, j].item() == pytest.approx(value, rel=1e-14)
    packed = quantized.packed()
    assert torch.equal(packed, pack_codes(given["codes"], 3))
    options = {name: value for name, value in given.items() if name != "codes"}
    again = QuantizedTensor.from_packed(
        packed, **options, **more, shape=(3, 5), dtype=torch.float64
    )
    assert torch.equal(again.dequantize(), values)
    for other in (copy.deepcopy(quantized), quantized.to("cpu")):
        assert torch.equal(other.dequantize(), values)


def test_dtypes() -> None:
    weight = torch.randn(3, 5)
    quantized = rtn_quantize(weight.bfloat16())
    assert quantized.dtype == quantized.dequantize().dtype == torch.bfloat16
    assert quantized.dequantize(torch.float64).dtype == torch.float64
    plain = QuantizedTensor(quantized.codes, quantized.scale, quantized.zero_point, bits=4)
    assert plain.dtype == plain.dequantize().dtype == torch.float32


def test_it_can_be_pickled_and_shown() -> None:
    quantized = rtn_quantize(torch.randn(3, 5), group_size=4)
    again = pickle.loads(pickle.dumps(quantized))
    assert torch.equal(again.dequantize(), quantized.dequantize())
    assert repr(quantized) == (
        "QuantizedTensor((3, 5), 4 bits, axis='out', groups of 4, torch.float32)"
    )


def test_it_moves_as_a_whole() -> None:
    index = torch.tensor([1, 0, 0, 1, 1])
    moved = QuantizedTensor(**parts(), group_index=index).to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert moved.tensors().keys() == {"codes", "scale", "zero_point", "group_index"}
    assert moved.device.type == "meta"


def test_it_does_not_change() -> None:
    with pytest.raises(AttributeError):
        rtn_quantize(torch.ones(1, 1)).bits = 3  # type: ignore[misc]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 9}, ValueError, "bits must be an int from 1 to 8"),
        ({"group_size": -1}, ValueError, "group_size must be"),
        ({"axis": "row"}, ValueError, "axis must be one of"),
        ({"codes": torch.ones(3, 5)}, TypeError, "codes must be an integer tensor"),
        ({"codes": torch.ones(3, 5).long()}, TypeError, "codes must be a tensor of uint8"),
        ({"scale": torch.ones(3, 1)}, ValueError, r"scale must be of shape \(3, 2\)"),
        ({"group_index": torch.zeros(5)}, TypeError, "group_index must be a tensor of int64"),
        ({"group_index": torch.zeros(4).long()}, ValueError, "group_index must be of shape"),
        ({"group_index": torch.full((5,), 2)}, ValueError, "group_index must be from 0 to 1"),
        ({"group_index": torch.full((5,), -1)}, ValueError, "group_index must be from 0 to 1"),
        ({"input_scale": torch.ones(3)}, ValueError, "input_scale must be of shape"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating dtype"),
        ({"scale": torch.ones(3, 2, device="meta")}, ValueError, "scale must lie on the device"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    QuantizedTensor(**parts())
    with pytest.raises(error, match=rf"^QuantizedTensor: {message}"):
        QuantizedTensor(**(parts() | change))


def test_groups_of_rows_have_no_group_index() -> None:
    one = torch.ones(1, 5)
    index = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^QuantizedTensor: group_index must be None"):
        QuantizedTensor(parts()["codes"], one, one, bits=3, axis="in", group_index=index)
