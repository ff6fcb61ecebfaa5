"""What only the tiles of a CPU do."""

import pytest
import torch
from torch.testing import assert_close

from tilework.norms._row_norm import tiled

from helpers import HALF, dtype_name


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_tiles_keep_statistics_of_the_rounded_sum_in_float32(dtype: torch.dtype) -> None:
    """The gradients are computed from them and from that sum."""
    input, residual = torch.randn(2, 64, 100).to(dtype)
    _, total, mean, rate = tiled.forward(
        input, residual, None, None, 1, 100, 1e-5, 0.0, centered=True
    )
    exact = total.double()
    assert_close(mean.double(), exact.mean(1), rtol=1e-5, atol=1e-6)
    expected = (exact.var(1, correction=0) + 1e-5).rsqrt()
    assert_close(rate.double(), expected, rtol=1e-6, atol=0)
