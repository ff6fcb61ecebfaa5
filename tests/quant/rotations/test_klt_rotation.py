"""Variances that a rotation levels, and factors."""

from typing import Any

import pytest
import torch

from tilework.quant import hadamard_matrix, klt_rotation, smooth_factors


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("width", [1, 2, 8])
def test_all_channels_have_the_same_variance(center: bool, width: int) -> None:
    x = torch.randn(50, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64)
    x = x + 3
    rotation = klt_rotation(x.reshape(5, 10, width), center=center)
    identity = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(rotation.T @ rotation, identity)
    turned = x @ rotation
    mean = turned.mean(0) if center else torch.zeros(width)
    moments = (turned - mean).square().sum(0) / 49
    torch.testing.assert_close(moments, moments.mean().expand(width))
    vectors = rotation @ hadamard_matrix(width, dtype=torch.float64)
    centred = x - x.mean(0) if center else x
    values = [(centred @ v).square().sum().item() for v in vectors.T]
    assert values == sorted(values, reverse=True)
    for column in vectors.T.tolist():
        assert max(column, key=abs) > 0


def test_factors() -> None:
    x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    x[:, 1], w[:, 2] = 0, 0
    for alpha in (0.0, 0.3, 0.5, 1.0):
        found = smooth_factors(x.reshape(2, 2, 3), w, alpha=alpha)
        for j in range(3):
            inputs = max(abs(v) for v in x[:, j].tolist())
            weights = max(max(abs(v) for v in w[:, j].tolist()), 1e-5)
            assert found[j].item() == pytest.approx(
                max(inputs**alpha / weights ** (1 - alpha), 1e-5)
            )
    torch.testing.assert_close(smooth_factors(x, w), smooth_factors(x, w, alpha=0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(6, 4).to(dtype)
    assert klt_rotation(x).dtype == torch.float32
    assert smooth_factors(x, x).dtype == torch.float32


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("function", "given", "error", "message"),
    [
        (klt_rotation, {"input": torch.ones(4, 3)}, ValueError, "input must be .* power of two"),
        (klt_rotation, {"input": torch.ones(1, 4)}, ValueError, "input must be of at least two"),
        (klt_rotation, {"input": torch.ones(2, 2) * torch.inf}, ValueError, "input must be finite"),
        (klt_rotation, {"input": torch.ones(2, 2).long()}, TypeError, "input must be a floating"),
        (smooth_factors, {"weight": torch.ones(2, 4)}, ValueError, "input must be non-empty of"),
        (smooth_factors, {"alpha": 1.5}, ValueError, "alpha must be a number from 0 to 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(function: Any, given: Any, error: type[Exception], message: str) -> None:
    defaults: dict[Any, dict[str, Any]] = {
        klt_rotation: {},
        smooth_factors: {"input": torch.ones(2, 2), "weight": torch.ones(2, 2)},
    }
    with pytest.raises(error, match=rf"^{function.__name__}: {message}"):
        function(**(defaults[function] | given))
