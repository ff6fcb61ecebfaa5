"""Monotone quantiles, against numpy's sort and scikit-learn's isotonic regression."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from tilework.losses import monotone_quantiles, pinball_loss

import samples
from calls import Call, draw
from helpers import FLOATING, dtype_name
from losses.regression.quantiles import quantiles

METHODS = ("sort", "isotonic")


def by_numpy(input: Tensor, method: str) -> Tensor:
    rows = input.double().reshape(-1, input.shape[-1]).numpy()
    function = np.sort if method == "sort" else isotonic_regression
    return torch.tensor(np.array([function(row) for row in rows])).reshape(input.shape)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 1), (13, 9), (2, 3, 63), (0, 4)])
def test_equals_numpys(shape: tuple[int, ...], method: str, dtype: torch.dtype) -> None:
    input = torch.randn(shape).to(dtype)
    before = input.clone()
    actual = monotone_quantiles(input, method=method)
    assert actual.dtype == dtype
    assert actual.shape == shape
    assert torch.equal(input, before)
    eps = torch.finfo(dtype).eps
    expected = by_numpy(input, method) if input.numel() else input.double()
    torch.testing.assert_close(actual.double(), expected, rtol=2 * eps, atol=4 * eps)
    assert (actual.diff() >= 0).all()
    assert torch.equal(monotone_quantiles(actual, method=method), actual)


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.sampled_from(METHODS), st.booleans()
)
def test_ties(values: list[int], method: str, strided: bool) -> None:
    input = torch.tensor(values, dtype=torch.float64)
    actual = monotone_quantiles(torch.stack([input, -input], 1)[:, 0] if strided else input)
    torch.testing.assert_close(actual, by_numpy(input, "sort"))
    actual = monotone_quantiles(input, method=method)
    torch.testing.assert_close(actual, by_numpy(input, method))


@given(st.integers(1, 12), st.integers(0, 10**6), st.sampled_from(METHODS))
def test_pinball_loss_does_not_rise(levels: int, seed: int, method: str) -> None:
    torch.manual_seed(seed)
    tensors = quantiles(6, levels=levels)
    before = pinball_loss(**tensors, reduction="none").mean(-1)
    better = monotone_quantiles(tensors["input"], method=method)
    after = pinball_loss(**(tensors | {"input": better}), reduction="none").mean(-1)
    assert (after <= before + 1e-14).all()


def test_cascades_of_blocks() -> None:
    """Each pooled block falls below the one before it only after a round of its own."""
    input = torch.tensor([5.0, 6.0, 7.0, 8.0, -30.0, 9.0, -40.0], dtype=torch.float64)
    for row in (input, -input.flip(0), input[:5], torch.arange(9.0).flip(0)):
        torch.testing.assert_close(
            monotone_quantiles(row, method="isotonic"), by_numpy(row, "isotonic").to(row.dtype)
        )


@pytest.mark.untyped
@pytest.mark.parametrize("method", METHODS)
def test_gradients(method: str) -> None:
    input = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def function(input: Tensor) -> Tensor:
        return monotone_quantiles(input, method=method)

    assert torch.autograd.gradcheck(function, input, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, input)
    result = monotone_quantiles(
        torch.tensor([1.0, 4.0, 2.0], requires_grad=True).double(), method=method
    )
    jacobian = torch.stack(
        [
            torch.autograd.functional.jacobian(function, torch.tensor([1.0, 4.0, 2.0]))[k]
            for k in range(len(result))
        ]
    )
    expected = [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    if method == "isotonic":
        expected = [[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]]
    assert jacobian.tolist() == expected


@pytest.mark.untyped
@pytest.mark.parametrize("method", METHODS)
def test_transforms(method: str) -> None:
    input = torch.randn(3, 4, 5)
    expected = monotone_quantiles(input, method=method)
    compiled = torch.compile(monotone_quantiles, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input, method=method), expected)
    batched = torch.func.vmap(lambda rows: monotone_quantiles(rows, method=method))(input)
    torch.testing.assert_close(batched, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(monotone_quantiles(input, method=method), expected)


@pytest.mark.parametrize("method", METHODS)
def test_extremes(method: str) -> None:
    assert monotone_quantiles(torch.tensor([2.0, torch.nan, 1.0]), method=method).isnan().any()
    infinite = torch.tensor([torch.inf, 1.0, 2.0, -torch.inf])
    assert not monotone_quantiles(infinite, method=method).isfinite().all()
    large = torch.tensor([65504.0, 65000.0, 64000.0], dtype=torch.float16)
    expected = by_numpy(large, method).half()
    assert torch.equal(monotone_quantiles(large, method=method), expected)


@pytest.mark.untyped
def test_bad_input() -> None:
    for shape in ((), (4, 0)):
        with pytest.raises(ValueError, match="monotone_quantiles: input must be of shape"):
            monotone_quantiles(torch.zeros(shape))
    with pytest.raises(TypeError, match="monotone_quantiles: input must be a floating-point"):
        monotone_quantiles(torch.arange(3))
    with pytest.raises(ValueError, match="monotone_quantiles: method must be one of 'sort'"):
        monotone_quantiles(torch.zeros(3), method="pava")
    with pytest.raises(TypeError, match="unexpected keyword"):
        monotone_quantiles(torch.zeros(3), methd="sort")  # type: ignore[call-arg]


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            monotone_quantiles,
            lambda: {"input": draw(5, 4)},
            differentiable=("input",),
            options=({}, {"method": "isotonic"}),
            sizes={4: 4},
        ),
    ]
