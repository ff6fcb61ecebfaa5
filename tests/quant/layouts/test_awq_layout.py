"""AWQ's tensors read bit by bit in the order of its kernels."""

import numpy as np
import pytest
import torch

from tilework.quant import awq_quantize, from_awq, rtn_quantize, to_awq

from quant.layouts.problems import drawn, read

PLACES = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
"""Where each of eight outputs lies in a word."""


def in_order(codes: np.ndarray) -> np.ndarray:
    result = np.empty_like(codes)
    for j in range(codes.shape[-1]):
        result[..., j] = codes[..., j // 8 * 8 + PLACES[j % 8]]
    return result


@pytest.mark.parametrize("size", [None, 16])
def test_bits_and_round_trip(size: int | None) -> None:
    quantized = drawn(24, 48, 4, size)
    tensors = to_awq(quantized)
    groups = 3 if size else 1
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "qweight": ((48, 3), torch.int32),
        "qzeros": ((groups, 3), torch.int32),
        "scales": ((groups, 24), torch.float16),
    }
    codes = in_order(read(tensors["qweight"], 4, 24))
    zeros = in_order(read(tensors["qzeros"], 4, 24))
    index = np.arange(48) // (size or 48)
    weight = tensors["scales"].double().numpy()[index] * (codes - zeros[index])
    np.testing.assert_allclose(weight.T, quantized.dequantize(torch.float64).numpy(), rtol=1e-6)
    again = from_awq(tensors, group_size=size)
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.dequantize(torch.float32), quantized.dequantize(torch.float32))
    assert again.dtype == torch.float16
    assert from_awq(tensors, group_size=size, dtype=torch.float32).dtype == torch.float32


def test_a_known_word() -> None:
    quantized = drawn(8, 1, 4, None)
    quantized.codes.copy_(torch.arange(8).unsqueeze(1))
    assert to_awq(quantized)["qweight"].item() == 0x75316420


@pytest.mark.untyped
def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"^to_awq: quantized must be of 4 bits"):
        to_awq(drawn(24, 48, 8, 16))
    with pytest.raises(ValueError, match=r"^to_awq: quantized must have a number of outputs"):
        to_awq(drawn(20, 48, 4, 16))
    with pytest.raises(ValueError, match=r"^to_awq: quantized must have groups in order"):
        to_awq(drawn(24, 48, 4, 16, ordered=False))
    scaled = awq_quantize(torch.randn(8, 16), torch.randn(9, 16), group_size=8)
    with pytest.raises(ValueError, match=r"^to_awq: quantized must have no input_scale"):
        to_awq(scaled)
    with pytest.raises(TypeError, match=r"^to_awq: scale_dtype must be torch.float16"):
        to_awq(rtn_quantize(torch.randn(8, 16)), scale_dtype=torch.float64)
    tensors = to_awq(drawn(24, 48, 4, 16))
    for change, error, message in [
        ({"g_idx": torch.ones(48)}, ValueError, "tensors must be qweight, qzeros, scales"),
        ({"qweight": tensors["qweight"][:, :2]}, ValueError, r"qweight must be of shape \(48, 3\)"),
        ({"qzeros": tensors["qzeros"][:2]}, ValueError, r"qzeros must be of shape \(3, 3\)"),
        ({"scales": tensors["scales"][:2]}, ValueError, r"scales must be of shape \(3, 24\)"),
        ({"qzeros": tensors["qzeros"].short()}, TypeError, "qzeros must be of a dtype int32"),
    ]:
        with pytest.raises(error, match=rf"^from_awq: {message}"):
            from_awq(tensors | change, group_size=16)
