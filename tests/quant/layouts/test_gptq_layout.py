"""GPTQ's tensors read bit by bit, by the formula of those who serve them."""

from typing import Any

import numpy as np
import pytest
import torch

from tilework.quant import (
    QuantizedTensor,
    from_gptq,
    gptq_quantize,
    rtn_quantize,
    spqr_quantize,
    to_gptq,
)

from quant.layouts.problems import drawn, read


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize("ordered", [True, False])
def test_bits_and_round_trip(bits: int, form: str, size: int | None, ordered: bool) -> None:
    quantized = drawn(32, 64, bits, size, ordered=ordered, least=1)
    tensors = to_gptq(quantized, checkpoint_format=form)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "qweight": ((64 * bits // 32, 32), torch.int32),
        "qzeros": ((2 if size else 1, bits), torch.int32),
        "scales": ((2 if size else 1, 32), torch.float16),
        "g_idx": ((64,), torch.int32),
    }
    codes = read(tensors["qweight"].T, bits, 64).T
    zeros = read(tensors["qzeros"], bits, 32) + (form == "gptq")
    index = tensors["g_idx"].numpy()
    scales = tensors["scales"].double().numpy()
    weight = scales[index] * (codes - zeros[index])
    np.testing.assert_allclose(weight.T, quantized.dequantize(torch.float64).numpy(), rtol=1e-6)
    again = from_gptq(tensors, bits=bits, group_size=size, checkpoint_format=form)
    assert torch.equal(again.codes, quantized.codes)
    assert torch.equal(again.zero_point, quantized.zero_point)
    assert torch.equal(again.scale, quantized.scale)
    assert again.dtype == torch.float16
    assert (again.group_index is None) == (ordered or size is None)
    assert torch.equal(again.dequantize(torch.float32), quantized.dequantize(torch.float32))


def test_weights_of_the_algorithm() -> None:
    x = torch.randn(200, 64) @ torch.randn(64, 64)
    quantized = gptq_quantize(torch.randn(32, 64), x.T @ x, group_size=16, act_order=True)
    tensors = to_gptq(quantized, checkpoint_format="gptq_v2", scale_dtype=torch.float32)
    again = from_gptq(
        tensors, bits=4, group_size=16, checkpoint_format="gptq_v2", dtype=torch.bfloat16
    )
    assert torch.equal(again.dequantize(torch.float32), quantized.dequantize())
    assert again.dequantize().dtype == torch.bfloat16
    half = to_gptq(quantized, checkpoint_format="gptq_v2", scale_dtype=torch.bfloat16)
    assert half["scales"].dtype == torch.bfloat16


@pytest.mark.untyped
def test_what_has_no_place_is_refused() -> None:
    good = drawn(32, 64, 4, 32, least=1)
    parts = {name: getattr(good, name) for name in ("codes", "scale", "zero_point")}
    common: dict[str, Any] = {"bits": 4, "group_size": 32}
    for quantized, error, message in [
        (drawn(32, 64, 5, 32), ValueError, "quantized must be of 2 or 3 or 4 or 8 bits"),
        (drawn(30, 64, 4, 32, least=1), ValueError, "quantized must have a number of outputs"),
        (drawn(32, 60, 4, 30, least=1), ValueError, "quantized must have a number of inputs"),
        (rtn_quantize(torch.randn(32, 64), axis="in"), ValueError, "quantized must be of axis='o"),
        (
            QuantizedTensor(**parts, **common, input_scale=torch.ones(64)),
            ValueError,
            "quantized must have no input_scale; apply_scale_ folds it",
        ),
        (
            QuantizedTensor(parts["codes"], parts["scale"], parts["zero_point"] + 0.5, **common),
            ValueError,
            "quantized must have zero-points that are integers",
        ),
        (
            QuantizedTensor(parts["codes"], parts["scale"], 0 * parts["zero_point"], **common),
            ValueError,
            "quantized must have zero-points of at least 1 for the format 'gptq'",
        ),
        (rtn_quantize(torch.randn(32, 64), group_size=24), ValueError, "quantized must be of gr"),
        (spqr_quantize(torch.randn(32, 64), torch.eye(64)), TypeError, "quantized must be a Qua"),
        (torch.ones(32, 64), TypeError, "quantized must be a QuantizedTensor"),
    ]:
        with pytest.raises(error, match=rf"^to_gptq: {message}"):
            to_gptq(quantized)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^to_gptq: checkpoint_format must be one of 'gptq'"):
        to_gptq(good, checkpoint_format="v2")
    with pytest.raises(TypeError, match=r"^to_gptq: scale_dtype must be torch.float16"):
        to_gptq(good, scale_dtype=torch.int32)


@pytest.mark.untyped
def test_tensors_that_do_not_fit_are_refused() -> None:
    tensors = to_gptq(drawn(32, 64, 4, 32, least=1))
    for change, error, message in [
        ({"bias": torch.ones(32)}, ValueError, "tensors must be qweight, qzeros, scales, g_idx"),
        ({"qweight": tensors["qweight"].long()}, TypeError, "qweight must be of a dtype int32"),
        ({"scales": tensors["scales"].int()}, TypeError, "scales must be of a dtype floating"),
        ({"qweight": tensors["qweight"][:4]}, ValueError, r"qweight must be of shape \(8, 32\)"),
        ({"qzeros": tensors["qzeros"][:1]}, ValueError, r"qzeros must be of shape \(2, 4\)"),
        ({"scales": tensors["scales"][:1]}, ValueError, r"scales must be of shape \(2, 32\)"),
    ]:
        with pytest.raises(error, match=rf"^from_gptq: {message}"):
            from_gptq(tensors | change, bits=4, group_size=32)
    with pytest.raises(ValueError, match=r"^from_gptq: qzeros must not hold 15 in the format"):
        from_gptq(tensors | {"qzeros": -torch.ones(2, 4).int()}, bits=4, group_size=32)
    huge = drawn(32, 64, 4, 32, least=1)
    huge.scale[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"^to_gptq: scale_dtype must hold all scales"):
        to_gptq(huge)
    huge.scale[0, 0] = 1e-9
    with pytest.raises(ValueError, match=r"^to_gptq: scale_dtype must hold all scales"):
        to_gptq(huge)
    with pytest.raises(ValueError, match=r"^from_gptq: tensors must be qweight"):
        from_gptq({}, bits=4, group_size=32)
    with pytest.raises(ValueError, match=r"^from_gptq: bits must be one of 2, 3, 4, 8"):
        from_gptq(tensors, bits=5, group_size=32)
    with pytest.raises(ValueError, match=r"group_index must be from 0 to 1"):
        from_gptq(tensors | {"g_idx": torch.full((64,), 2).int()}, bits=4, group_size=32)
