"""The share of space, by eigenvalues and the gamma function."""

import math

import numpy as np
import pytest
import torch

from tilework.quant import qsur


@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_formula(width: int) -> None:
    x = torch.randn(30, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64)
    values = x.numpy()
    covariance = np.atleast_2d(np.cov(values.T, bias=True))
    span = 2 * np.abs(values - values.mean(0)).max()
    ball = math.pi ** (width / 2) / math.gamma(width / 2 + 1)
    logs = np.log(np.linalg.eigvalsh(covariance)).sum() / 2
    expected = (math.log(ball) + logs - width * math.log(span)) / width
    assert qsur(x).item() == pytest.approx(expected)


def test_laws() -> None:
    x = torch.randn(100, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    torch.testing.assert_close(qsur(7 * x + 3), qsur(x))
    centred = x - x.mean(0)
    whitened = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T @ centred)).T
    skewed = whitened * torch.tensor([1.0, 1.0, 1.0, 0.05], dtype=torch.float64)
    assert qsur(whitened) > qsur(skewed)


def test_singular_rows_have_no_volume() -> None:
    x = torch.randn(20, 3)
    x[:, 2] = x[:, 0] + x[:, 1]
    assert qsur(x).item() == -math.inf
    assert qsur(torch.randn(3, 3)).item() == -math.inf
    assert qsur(torch.ones(5, 2)).item() == -math.inf
    assert qsur(torch.randn(20, 3).bfloat16()).dtype == torch.float32


@pytest.mark.untyped
def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"^qsur: input must be a non-empty matrix"):
        qsur(torch.ones(3))
    with pytest.raises(ValueError, match=r"^qsur: input must be finite"):
        qsur(torch.full((3, 2), torch.nan))
    with pytest.raises(TypeError, match=r"^qsur: input must be a floating-point tensor"):
        qsur(torch.ones(3, 2).long())
