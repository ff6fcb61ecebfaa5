"""Moments against scipy, and gradients where they are not smooth."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from tilework.quant import kurtosis, kurtosis_loss

import samples
from calls import Call, draw


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(kurtosis, lambda: {"input": draw(4, 5)}, differentiable=("input",)),
        Call(
            kurtosis_loss,
            lambda: {"input": draw(4, 5)},
            differentiable=("input",),
            options=({"target": 2.5}, {"reduction": "none"}, {"reduction": "sum"}),
        ),
    ]


@pytest.mark.parametrize("dim", [-1, 0, 1, (0, 2), (0, 1, 2)])
def test_scipy(dim: int | tuple[int, ...]) -> None:
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    found = kurtosis(x, dim=dim)
    dims = (dim,) if isinstance(dim, int) else dim
    moved = np.moveaxis(x.numpy(), dims, range(-len(dims), 0))
    flat = moved.reshape(*moved.shape[: 3 - len(dims)], -1)
    expected = scipy.stats.kurtosis(flat, axis=-1, fisher=False)
    np.testing.assert_allclose(found.numpy(), expected)


def test_eps_and_the_law_of_the_units() -> None:
    x = torch.randn(50, dtype=torch.float64)
    centred = x - x.mean()
    expected = (centred**4).mean() / ((centred**2).mean() ** 2 + 0.5)
    torch.testing.assert_close(kurtosis(x, eps=0.5), expected)
    torch.testing.assert_close(kurtosis(-3.0 * x + 7), kurtosis(x))
    uniform = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    assert kurtosis(uniform).item() == pytest.approx(1.8, rel=1e-4)
    assert kurtosis(torch.ones(4)).isnan()


def rows(x: Tensor, target: float, eps: float) -> list[float]:
    result = []
    for row in x.reshape(-1, x.shape[-1]).tolist():
        mean = sum(row) / len(row)
        second = sum((v - mean) ** 2 for v in row) / len(row)
        fourth = sum((v - mean) ** 4 for v in row) / len(row)
        result.append(abs(fourth / (second**2 + eps) - target))
    return result


def test_the_loss_of_rows() -> None:
    x = torch.randn(3, 4, 7, dtype=torch.float64)
    expected = torch.tensor(rows(x, 2.0, 0.3), dtype=torch.float64)
    options = {"target": 2.0, "eps": 0.3}
    torch.testing.assert_close(
        kurtosis_loss(x, reduction="none", **options), expected.reshape(3, 4)
    )
    torch.testing.assert_close(kurtosis_loss(x, **options), expected.mean())
    torch.testing.assert_close(kurtosis_loss(x, reduction="sum", **options), expected.sum())
    default = torch.tensor(rows(x, 1.8, 1e-8), dtype=torch.float64)
    torch.testing.assert_close(kurtosis_loss(x, reduction="none").flatten(), default)


def test_gradients() -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kurtosis_loss, x)
    assert torch.autograd.gradgradcheck(kurtosis_loss, x)
    constant = torch.ones(2, 4, requires_grad=True)
    kurtosis_loss(constant).backward()
    assert constant.grad is not None
    assert not constant.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_in_float32(dtype: torch.dtype) -> None:
    x = (100 * torch.randn(64)).to(dtype)
    exact = kurtosis(x.double())
    assert kurtosis(x).dtype == torch.float32
    torch.testing.assert_close(kurtosis(x).double(), exact, rtol=1e-5, atol=0)
    assert kurtosis_loss(torch.ones(0, 3).to(dtype), reduction="none").shape == (0,)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("function", "given", "error", "message"),
    [
        (kurtosis, {"dim": 2}, ValueError, "dim must be of different dimensions of 2"),
        (kurtosis, {"dim": (0, -2)}, ValueError, "dim must be of different dimensions"),
        (kurtosis, {"dim": 1.0}, TypeError, "dim must be an int"),
        (kurtosis, {"input": torch.ones(2, 0)}, ValueError, "input must be with entries"),
        (kurtosis, {"input": torch.ones(2).long()}, TypeError, "input must be a floating"),
        (kurtosis, {"eps": -1.0}, ValueError, "eps must be a finite number of at least 0"),
        (kurtosis_loss, {"input": torch.ones(2, 0)}, ValueError, "input must be of shape"),
        (kurtosis_loss, {"target": torch.inf}, ValueError, "target must be a finite number"),
        (kurtosis_loss, {"reduction": "max"}, ValueError, "reduction must be one of"),
        (kurtosis_loss, {"eps": "0"}, TypeError, "eps must be a number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(function: object, given: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^{function.__name__}: {message}"):  # type: ignore[attr-defined]
        function(**({"input": torch.ones(2, 3)} | given))  # type: ignore[operator]
