"""The best product of two thin matrices, and the layer that adds it."""

import pytest
import torch
from torch import Tensor

from tilework.quant import LowRankLinear, low_rank_compensation, rtn_quantize


def drawn(rows: int = 7, columns: int = 5) -> tuple[Tensor, Tensor]:
    weight = torch.randn(rows, columns, dtype=torch.float64)
    return weight, weight + 0.3 * torch.randn_like(weight)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (4, 4), (1, 6), (6, 1)])
def test_the_rest_is_that_of_the_smaller_singular_values(shape: tuple[int, int]) -> None:
    weight, other = drawn(*shape)
    gram = (weight - other) @ (weight - other).T
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    for rank in range(1, min(shape) + 1):
        up, down = low_rank_compensation(weight, other, rank=rank)
        assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
        left = (weight - other - up @ down).square().sum()
        torch.testing.assert_close(left, squares[rank : min(shape)].sum(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))
        torch.testing.assert_close(up.norm(dim=0) ** 4, squares[:rank])
        for column in up.T.tolist():
            assert max(column, key=abs) > 0
    torch.testing.assert_close(other + up @ down, weight)


def test_no_difference_gives_zeros() -> None:
    weight, _ = drawn()
    up, down = low_rank_compensation(weight, weight, rank=2)
    assert not up.any()
    assert not down.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layer(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 8).to(dtype)
    quantized = rtn_quantize(weight, bits=2)
    up, down = low_rank_compensation(weight, quantized, rank=3)
    same = low_rank_compensation(weight, quantized.dequantize(torch.float32), rank=3)
    assert up.dtype == torch.float32
    assert torch.equal(up, same[0])
    assert torch.equal(down, same[1])
    bias = torch.randn(6).to(dtype)
    layer = LowRankLinear(quantized, up, down, bias)
    assert {name for name, _ in layer.named_parameters()} == {"bias", "up", "down"}
    assert {name for name, _ in layer.named_buffers()} == {"packed_codes", "scale", "zero_point"}
    x = torch.randn(2, 5, 8).to(dtype)
    exact = x.double() @ (quantized.dequantize(dtype).double() + up.double() @ down.double()).mT
    tolerance = 32 * torch.finfo(dtype).eps
    output = layer(x)
    assert output.dtype == dtype
    torch.testing.assert_close(
        output.double(), exact + bias.double(), rtol=tolerance, atol=tolerance
    )
    output.sum().backward()
    assert layer.up.grad is not None
    assert "rank=3" in repr(layer)
    other = LowRankLinear(quantized, torch.zeros(6, 3), torch.zeros(3, 8), torch.zeros(6))
    other.load_state_dict(layer.to(torch.float32).state_dict())
    torch.testing.assert_close(other(x.float()), layer(x.float()))


@pytest.mark.untyped
def test_refusals() -> None:
    weight, other = drawn()
    quantized = rtn_quantize(weight)
    for rank in (0, 6):
        with pytest.raises(ValueError, match=r"^low_rank_compensation: rank must be an int from 1"):
            low_rank_compensation(weight, other, rank=rank)
    with pytest.raises(TypeError, match=r"^low_rank_compensation: rank must be an int"):
        low_rank_compensation(weight, other, rank=True)
    with pytest.raises(ValueError, match=r"^low_rank_compensation: quantized_weight must be of s"):
        low_rank_compensation(weight, other.T)
    with pytest.raises(ValueError, match=r"^low_rank_compensation: weight must be finite"):
        low_rank_compensation(weight * torch.inf, other)
    with pytest.raises(ValueError, match=r"^LowRankLinear: up must be of shape \(7, 2\)"):
        LowRankLinear(quantized, torch.ones(5, 2), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"^LowRankLinear: down must be of shape \(2, 5\)"):
        LowRankLinear(quantized, torch.ones(7, 2), torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"^LowRankLinear: up must be a matrix"):
        LowRankLinear(quantized, torch.ones(7), torch.ones(3, 5))
    with pytest.raises(TypeError, match=r"^LowRankLinear: down must be a floating-point tensor"):
        LowRankLinear(quantized, torch.ones(7, 2), torch.ones(2, 5).long())
