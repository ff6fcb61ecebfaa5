"""What only the tiles of a CPU do."""

import pytest
import torch
from torch.testing import assert_close

from tilework.norms import layer_norm
from tilework.norms._row_norm import tiled
from tilework.norms._row_norm.common import RowNorm

from helpers import HALF, dtype_name


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_tiles_keep_statistics_of_the_rounded_sum_in_float32(dtype: torch.dtype) -> None:
    """The gradients are computed from them and from that sum."""
    input, residual = torch.randn(2, 64, 100).to(dtype)
    _, total, mean, rstd = tiled.forward(
        RowNorm(input, residual, None, None, 1, 100, 1e-5, 0.0, True, dtype, dtype, "tiled")
    )
    exact = total.double()
    assert_close(mean.double(), exact.mean(1), rtol=1e-5, atol=1e-6)
    expected = (exact.var(1, correction=0) + 1e-5).rsqrt()
    assert_close(rstd.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_gradients_of_many_rows_are_not_added_in_half_precision(dtype: torch.dtype) -> None:
    """As torch's kernel does on a CPU."""
    input = torch.randn(8192, 8).to(dtype)
    weight, bias = torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    upstream = (torch.rand(8192, 8) + 1).to(dtype)
    output = layer_norm(input, 8, weight.requires_grad_(), bias.requires_grad_())
    grads = torch.autograd.grad(output, (weight, bias), upstream)
    normal = torch.nn.functional.layer_norm(input.double(), (8,))
    expected = ((upstream.double() * normal).sum(0), upstream.double().sum(0))
    assert_close(grads[1].double(), expected[1], rtol=torch.finfo(dtype).eps, atol=0)
    scale = expected[1].abs().max() * torch.finfo(dtype).eps
    assert_close(grads[0].double(), expected[0], rtol=torch.finfo(dtype).eps, atol=float(scale))
