"""Weights of 4 bits as int8."""

from typing import Any

import pytest
import torch

from tilework.quant import (
    QuantLinear,
    W4A8Tensor,
    gptq_quantize,
    rtn_quantize,
    w4a8_quantize,
)

from quant.refusals import HESSIANS, WEIGHTS
from quant.rounding.problems import drawn


@pytest.mark.parametrize("size", [None, 4, 7, 23])
@pytest.mark.parametrize("with_hessian", [False, True])
def test_codes_and_scales(size: int | None, with_hessian: bool) -> None:
    weight, hessian = drawn(6, 23)
    weight[3] = 0
    options: dict[str, Any] = {
        "bits": 4,
        "group_size": size,
        "scheme": "restricted" if size is None else "symmetric",
    }
    found = w4a8_quantize(weight, hessian if with_hessian else None, group_size=size)
    base = (
        gptq_quantize(weight, hessian, **options)
        if with_hessian
        else rtn_quantize(weight, **options)
    )
    assert torch.equal(found.codes, base.codes)
    values, integers = base.dequantize(), found.int8_weight()
    assert integers.dtype == torch.int8
    for o in range(6):
        most = max(abs(v) for v in values[o].tolist())
        channel = base.scale[o, 0].item() if size is None else (most / 127 or 1.0)
        assert found.channel_scale[o].item() == pytest.approx(channel)
        for j in range(23):
            code = int(found.codes[o, j]) - 8
            if size is None:
                expected = code
            else:
                ratio = base.scale[o, j // size].item() / channel
                expected = min(max(round(code * ratio), -128), 127)
            assert integers[o, j] == expected
            assert found.dequantize()[o, j].item() == pytest.approx(channel * expected)
    assert (found.group_scale is None) == (size is None)


def test_options_reach_the_sweep() -> None:
    weight, hessian = drawn(5, 16)
    options: dict[str, Any] = {"group_size": 8, "scales": "stale", "block_size": 4, "damp": 0.3}
    found = w4a8_quantize(weight, hessian, **options)
    expected = gptq_quantize(weight, hessian, bits=4, scheme="symmetric", **options)
    assert torch.equal(found.codes, expected.codes)


def test_a_layer_of_them() -> None:
    for size in (None, 4):
        weights = w4a8_quantize(torch.randn(5, 11), group_size=size)
        layer = QuantLinear(weights)
        names = {"packed_codes", "channel_scale"} | ({"group_scale"} if size else set())
        assert set(layer.state_dict()) == names
        assert layer.packed_codes.shape == (5, 6)
        assert torch.equal(layer.weight, weights.dequantize())
        assert torch.equal(layer.quantized.codes, weights.codes)
        assert "W4A8Tensor((5, 11)" in repr(weights)
        assert weights.to("meta").codes.is_meta


WRONG = torch.zeros(2, 3, dtype=torch.uint8)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codes": WRONG.int()}, TypeError, "codes must be a tensor of uint8"),
        ({"channel_scale": torch.ones(2)}, ValueError, r"channel_scale must be of shape \(2, 1\)"),
        ({"channel_scale": torch.ones(2, 1).long()}, TypeError, "channel_scale must be a floating"),
        ({"group_scale": torch.ones(2, 2)}, ValueError, "group_scale and group_size come together"),
        ({"group_size": 2}, ValueError, "group_scale and group_size come together"),
        (
            {"group_size": 2, "group_scale": torch.ones(2, 1)},
            ValueError,
            r"group_scale must be of shape \(2, 2\)",
        ),
    ],
    ids=str,
)
def test_a_tensor_of_what_does_not_fit(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"codes": WRONG, "group_scale": None, "channel_scale": torch.ones(2, 1)}
    with pytest.raises(error, match=rf"^W4A8Tensor: {message}"):
        W4A8Tensor(**(given | change))


@pytest.mark.untyped
@pytest.mark.parametrize(
    "refusal",
    [
        *WEIGHTS,
        *HESSIANS,
        ("group_size must be an int of at least 1", ValueError, {"group_size": 0}),
        ("scales must be one of", ValueError, {"scales": "new"}),
        ("block_size must be an int of at least 1", ValueError, {"block_size": 0}),
    ],
    ids=lambda refusal: refusal[0],
)
def test_refusals_of_the_quantizer(refusal: Any) -> None:
    message, error, change = refusal
    given = {"weight": torch.ones(2, 3), "hessian": torch.eye(3)} | change
    with pytest.raises(error, match=rf"^w4a8_quantize: {message}"):
        w4a8_quantize(**given)
