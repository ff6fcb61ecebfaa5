"""Hessians of batches, against one product over all rows in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilework.quant import HessianAccumulator, hessian_loss


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 2**32))
def test_batches_do_not_matter(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(sizes), 4, dtype=torch.float64, generator=generator)
    accumulator = HessianAccumulator(4, dtype=torch.float64)
    for start, stop in pairwise([0, *torch.tensor(sizes).cumsum(0).tolist()]):
        accumulator.update(rows[start:stop])
    assert accumulator.count == len(rows)
    expected = 2 * sum(
        (torch.outer(row, row) for row in rows), torch.zeros(4, 4, dtype=torch.float64)
    )
    torch.testing.assert_close(accumulator.hessian, expected / max(len(rows), 1))


def test_leading_dimensions_are_rows() -> None:
    input = torch.randn(2, 3, 5)
    one, other = HessianAccumulator(5), HessianAccumulator(5)
    one.update(input)
    other.update(input.reshape(6, 5))
    assert one.count == other.count == 6
    assert torch.equal(one.hessian, other.hessian)
    one.update(torch.randn(5))
    assert one.count == 7


def test_merging_is_seeing_both() -> None:
    rows = torch.randn(9, 3, dtype=torch.float64)
    whole, one, other = (HessianAccumulator(3, dtype=torch.float64) for _ in range(3))
    whole.update(rows)
    one.update(rows[:2])
    other.update(rows[2:])
    before = other.hessian
    one.merge(other)
    assert one.count == 9
    torch.testing.assert_close(one.hessian, whole.hessian)
    assert torch.equal(other.hessian, before)
    one.merge(HessianAccumulator(3))
    torch.testing.assert_close(one.hessian, whole.hessian)
    empty = HessianAccumulator(3, dtype=torch.float64)
    empty.merge(whole)
    torch.testing.assert_close(empty.hessian, whole.hessian)


def test_it_begins_with_zeros_and_gives_copies() -> None:
    accumulator = HessianAccumulator(2)
    accumulator.update(torch.empty(0, 2))
    assert accumulator.count == 0
    assert torch.equal(accumulator.hessian, torch.zeros(2, 2))
    accumulator.hessian.fill_(7)
    assert torch.equal(accumulator.hessian, torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_are_in_the_dtype_of_the_accumulator(dtype: torch.dtype) -> None:
    rows = torch.randn(50, 3).to(dtype).requires_grad_()
    accumulator = HessianAccumulator(3)
    with torch.autocast("cpu", torch.bfloat16):
        accumulator.update(rows)
    assert accumulator.hessian.dtype == torch.float32
    assert not accumulator.hessian.requires_grad
    exact = rows.detach().double()
    torch.testing.assert_close(
        accumulator.hessian.double(), 2 / 50 * exact.T @ exact, rtol=1e-5, atol=1e-6
    )


@pytest.mark.untyped
def test_bad_input() -> None:
    accumulator = HessianAccumulator(2)
    with pytest.raises(ValueError, match=r"^HessianAccumulator: in_features must be"):
        HessianAccumulator(0)
    with pytest.raises(TypeError, match=r"^HessianAccumulator: dtype must be torch.float32 or"):
        HessianAccumulator(2, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^HessianAccumulator: input must be of shape \(..., 2\)"):
        accumulator.update(torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"^HessianAccumulator: input must be a floating-point"):
        accumulator.update(torch.ones(2, 2).long())
    with pytest.raises(ValueError, match=r"^HessianAccumulator: input must be finite"):
        accumulator.update(torch.full((1, 2), torch.inf))
    with pytest.raises(
        ValueError, match=r"^HessianAccumulator: other must be for rows of length 2"
    ):
        accumulator.merge(HessianAccumulator(3))
    with pytest.raises(TypeError, match=r"^HessianAccumulator: other must be a HessianAccumulator"):
        accumulator.merge(torch.ones(2, 2))
    assert accumulator.count == 0
    assert not accumulator.hessian.any()


def test_the_loss_is_that_of_the_output() -> None:
    weight, other = torch.randn(2, 3, 4, dtype=torch.float64)
    rows = torch.randn(7, 4, dtype=torch.float64)
    accumulator = HessianAccumulator(4, dtype=torch.float64)
    accumulator.update(rows)
    expected = 2 / 7 * (rows @ weight.T - rows @ other.T).square().sum()
    torch.testing.assert_close(hessian_loss(weight, other, accumulator.hessian), expected)
    assert hessian_loss(weight.float(), other.float(), torch.eye(4)).dtype == torch.float32
    assert hessian_loss(weight.float(), other, torch.eye(4)).dtype == torch.float64
    with pytest.raises(ValueError, match=r"^hessian_loss: quantized_weight must be of shape"):
        hessian_loss(weight, other[:2], torch.eye(4))
