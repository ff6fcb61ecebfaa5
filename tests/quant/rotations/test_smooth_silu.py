"""SiLU of scaled inputs."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilework.quant import SmoothSiLU, smooth_silu

import samples
from calls import Call, draw


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            smooth_silu,
            lambda: {"input": draw(4, 3), "scale": draw(3)},
            differentiable=("input", "scale"),
        )
    ]


@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0, "tensor"])
def test_silu(scale: Any) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    s = torch.rand(4, dtype=torch.float64) + 0.5 if scale == "tensor" else scale
    found = smooth_silu(x, s)
    for i in range(5):
        for j in range(4):
            factor = s[j].item() if isinstance(s, Tensor) else s
            v = x[i, j].item()
            assert found[i, j].item() == pytest.approx(v / (1 + math.exp(-factor * v)))
    torch.testing.assert_close(found, F.silu(s * x) / s)
    module = SmoothSiLU(s)
    torch.testing.assert_close(module(x), found)
    assert set(module.state_dict()) == {"scale"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(6, 4).to(dtype)
    assert smooth_silu(x, 2.0).dtype == dtype
    torch.testing.assert_close(smooth_silu(x, 1.0), F.silu(x.float()).to(dtype))
    assert SmoothSiLU(2.0)(x).dtype == dtype


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (torch.ones(3), ValueError, "scale must be broadcastable"),
        (math.inf, ValueError, "scale must be a finite number"),
        (torch.ones(2).long(), TypeError, "scale must be a floating"),
    ],
    ids=str,
)
def test_refusals(scale: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^smooth_silu: {message}"):
        smooth_silu(torch.ones(2, 2), scale)


@pytest.mark.untyped
def test_refusals_of_the_module() -> None:
    with pytest.raises(TypeError, match=r"^SmoothSiLU: scale must be a number"):
        SmoothSiLU("2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^SmoothSiLU: scale must be a floating-point tensor"):
        SmoothSiLU(torch.ones(2).long())
