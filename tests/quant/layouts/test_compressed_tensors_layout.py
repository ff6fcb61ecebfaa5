"""The layout bit for bit as the package compressed-tensors packs and reads it."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)

from tilework.quant import from_compressed_tensors, rtn_quantize, to_compressed_tensors

from quant.layouts.problems import drawn, read


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns", "size"), [(6, 64, 16), (5, 33, None), (3, 7, 7)])
def test_the_packers_of_the_package(bits: int, rows: int, columns: int, size: int | None) -> None:
    quantized = drawn(rows, columns, bits, size)
    tensors = to_compressed_tensors(quantized, scale_dtype=torch.float16, symmetric=False)
    middle = 2 ** (bits - 1)
    signed = (quantized.codes.int() - middle).to(torch.int8)
    zeros = (quantized.zero_point.int() - middle).to(torch.int8)
    assert torch.equal(tensors["weight_packed"], pack_to_int32(signed, bits))
    assert torch.equal(tensors["weight_zero_point"], pack_to_int32(zeros, bits, packed_dim=0))
    shape = torch.Size(tensors["weight_shape"].tolist())
    assert shape == (rows, columns)
    codes = unpack_from_int32(tensors["weight_packed"], bits, shape)
    assert torch.equal(codes, signed)
    assert (read(tensors["weight_packed"], bits, columns) == quantized.codes.numpy()).all()
    again = from_compressed_tensors(tensors, bits=bits, group_size=size)
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.zero_point, quantized.zero_point)
    assert torch.equal(again.dequantize(torch.float32), quantized.dequantize(torch.float32))
    assert again.dtype == torch.float16


def test_the_package_dequantizes_to_the_same() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    for scheme in ("asymmetric", "symmetric"):
        quantized = rtn_quantize(torch.randn(8, 64), group_size=32, scheme=scheme)
        tensors = to_compressed_tensors(quantized, scale_dtype=torch.float32)
        assert ("weight_zero_point" in tensors) == (scheme == "asymmetric")
        shape = torch.Size((8, 64))
        codes = unpack_from_int32(tensors["weight_packed"], 4, shape)
        zeros = None
        if scheme == "asymmetric":
            stream = tensors["weight_zero_point"]
            zeros = unpack_from_int32(stream, 4, torch.Size((8, 2)), packed_dim=0)
        args = QuantizationArgs(
            num_bits=4, symmetric=scheme == "symmetric", strategy="group", group_size=32
        )
        found = dequantize(codes, tensors["weight_scale"], zeros, args=args)
        torch.testing.assert_close(found, quantized.dequantize())
        again = from_compressed_tensors(tensors, bits=4, group_size=32)
        assert torch.equal(again.dequantize(), quantized.dequantize())


def test_groups_in_another_order() -> None:
    quantized = drawn(4, 32, 4, 8, ordered=False)
    tensors = to_compressed_tensors(quantized)
    assert tensors["weight_scale"].dtype == torch.bfloat16
    assert np.array_equal(tensors["weight_g_idx"].numpy(), quantized.group_index.numpy())
    again = from_compressed_tensors(tensors, bits=4, group_size=8)
    assert torch.equal(again.group_index, quantized.group_index)


@pytest.mark.untyped
def test_refusals() -> None:
    quantized = drawn(4, 32, 4, 8)
    with pytest.raises(ValueError, match=r"^to_compressed_tensors: symmetric must not be True"):
        to_compressed_tensors(quantized, symmetric=True)
    with pytest.raises(TypeError, match=r"^to_compressed_tensors: scale_dtype must be torch.fl"):
        to_compressed_tensors(quantized, scale_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"^to_compressed_tensors: quantized must be of axis='out"):
        to_compressed_tensors(rtn_quantize(torch.randn(4, 4), axis="tensor"))
    tensors = to_compressed_tensors(quantized)
    for change, error, message in [
        ({"weight": torch.ones(2)}, ValueError, "tensors must be weight_packed"),
        ({"weight_packed": torch.ones(4, 3).int()}, ValueError, r"weight_packed must be of shape"),
        ({"weight_scale": torch.ones(4, 3)}, ValueError, r"weight_scale must be of shape \(4, 4\)"),
        ({"weight_zero_point": torch.ones(2, 4).int()}, ValueError, "weight_zero_point must be of"),
        ({"weight_shape": torch.ones(2)}, TypeError, "weight_shape must be of a dtype int64"),
        ({"weight_g_idx": torch.ones(3).int()}, ValueError, "weight_g_idx must be of shape"),
    ]:
        with pytest.raises(error, match=rf"^from_compressed_tensors: {message}"):
            from_compressed_tensors(tensors | change, bits=4, group_size=8)
