"""Directions of steepest descent, against their defining maximum and loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.optim import dual_direction, newton_schulz

import samples
from calls import Call, draw
from helpers import FLOATING, HALF, dtype_name

NORMS = ("linf", "l2", "spectral", "rms", "embedding")
CUBIC = {"coefficients": (1.5, -0.5, 0.0), "steps": 30}


def norm_of(direction: Tensor, norm: str) -> float:
    """The norm that a direction is measured in, by NumPy."""
    array = direction.double().numpy()
    if norm == "linf":
        return np.abs(array).max()
    if norm == "l2":
        return math.sqrt((array**2).sum())
    matrix = array.reshape(len(array), -1)
    rows, columns = matrix.shape
    if norm == "embedding":
        return np.sqrt((matrix**2).mean(1)).max()
    largest = np.linalg.norm(matrix, 2)
    return largest if norm == "spectral" else math.sqrt(columns / rows) * largest


def dual_of(grad: Tensor, norm: str) -> float:
    """The dual norm in closed form, by NumPy."""
    array = grad.double().numpy()
    if norm == "linf":
        return np.abs(array).sum()
    if norm == "l2":
        return math.sqrt((array**2).sum())
    matrix = array.reshape(len(array), -1)
    rows, columns = matrix.shape
    if norm == "embedding":
        return math.sqrt(columns) * sum(math.hypot(*row) for row in matrix.tolist())
    nuclear = np.linalg.norm(matrix, "nuc")
    return nuclear if norm == "spectral" else math.sqrt(rows / columns) * nuclear


@given(
    st.sampled_from(NORMS),
    st.sampled_from([(1, 1), (3, 5), (5, 3), (4, 2, 3), (2, 1, 3, 2), (6, 1)]),
    st.integers(0, 2**32),
)
def test_it_is_the_maximum(norm: str, shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    grad = torch.randn(shape, dtype=torch.float64)
    before = grad.clone()
    direction, dual = dual_direction(grad, norm)
    assert torch.equal(grad, before)
    assert direction.shape == shape
    assert dual.shape == ()
    assert norm_of(direction, norm) == pytest.approx(1, rel=1e-9)
    product = (grad * direction).sum().item()
    assert dual.item() == pytest.approx(product, rel=1e-9)
    assert dual.item() == pytest.approx(dual_of(grad, norm), rel=1e-9)
    other = torch.randn(shape, dtype=torch.float64)
    assert (grad * other).sum().item() <= norm_of(other, norm) * dual.item() * (1 + 1e-9)


def test_vectors() -> None:
    for grad in (torch.tensor([3.0, 0.0, -4.0]), torch.tensor(-2.0)):
        direction, dual = dual_direction(grad, "linf")
        assert torch.equal(direction, grad.sign())
        assert dual == grad.abs().sum()
        direction, dual = dual_direction(grad, "l2")
        torch.testing.assert_close(direction, grad / grad.norm())
        torch.testing.assert_close(dual, grad.norm())


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
def test_rotations_and_scales(method: str) -> None:
    grad = torch.randn(4, 6, dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(n, n).double()).Q for n in (4, 6))
    direction, dual = dual_direction(grad, "spectral", method=method)
    turned, same = dual_direction(left @ grad @ right, "spectral", method=method)
    torch.testing.assert_close(turned, left @ direction @ right)
    torch.testing.assert_close(same, dual)
    scaled, tenfold = dual_direction(10 * grad, "spectral", method=method)
    torch.testing.assert_close(scaled, direction)
    torch.testing.assert_close(tenfold, 10 * dual)


@pytest.mark.parametrize("norm", ["spectral", "rms"])
@pytest.mark.parametrize("shape", [(3, 5), (5, 2, 1)])
def test_newton_schulz(norm: str, shape: tuple[int, ...]) -> None:
    grad = torch.randn(shape, dtype=torch.float64)
    expected = dual_direction(grad, norm)
    for actual, value in zip(
        dual_direction(grad, norm, method="newton_schulz", **CUBIC), expected, strict=True
    ):
        torch.testing.assert_close(actual, value)
    matrix = grad.flatten(1)
    scale = 1 if norm == "spectral" else math.sqrt(matrix.shape[0] / matrix.shape[1])
    options = {"steps": 3, "coefficients": (2.0, -1.5, 0.5), "eps": 50.0}
    rough = newton_schulz(matrix, **options)
    direction, dual = dual_direction(grad, norm, method="newton_schulz", **options)
    torch.testing.assert_close(direction, scale * rough.reshape(shape))
    torch.testing.assert_close(dual, scale * (matrix * rough).sum())
    for other in ("linf", "l2", "embedding"):
        for one, two in zip(
            dual_direction(grad, other),
            dual_direction(grad, other, method="newton_schulz"),
            strict=True,
        ):
            assert torch.equal(one, two)


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
@pytest.mark.parametrize("norm", NORMS)
def test_zeros_and_sizes(norm: str, method: str) -> None:
    for shape in ((3, 4), (0, 3), (3, 0), (0, 0), (2, 0, 3)):
        direction, dual = dual_direction(torch.zeros(shape), norm, method=method)
        assert torch.equal(direction, torch.zeros(shape))
        assert dual == 0
    grad = torch.randn(6, 4, 3).permute(2, 1, 0)[:, ::2]
    for one, two in zip(
        dual_direction(grad, norm, method=method),
        dual_direction(grad.contiguous(), norm, method=method),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


def test_zero_rows_and_rank() -> None:
    grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    direction, dual = dual_direction(grad, "embedding")
    torch.testing.assert_close(direction, 2**0.5 * torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    torch.testing.assert_close(dual, torch.tensor(5 * 2**0.5))
    for dtype in (torch.float32, torch.float64):
        left, right = torch.randn(7, 2).to(dtype), torch.randn(2, 5).to(dtype)
        direction, dual = dual_direction(left @ right, "spectral")
        values = torch.linalg.svdvals(direction)
        torch.testing.assert_close(values, torch.tensor([1.0, 1, 0, 0, 0]).to(dtype))
        torch.testing.assert_close(((left @ right) * direction).sum(), dual)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("norm", NORMS)
def test_dtypes(norm: str, dtype: torch.dtype) -> None:
    grad = torch.randn(4, 6).to(dtype)
    direction, dual = dual_direction(grad, norm)
    truth, largest = dual_direction(grad.double(), norm)
    assert direction.dtype == dtype
    assert dual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = torch.finfo(dtype).eps
    rtol, atol = (eps, 1e-6) if dtype in HALF else (1e-5, 1e-5)
    torch.testing.assert_close(direction.double(), truth, rtol=rtol, atol=atol)
    torch.testing.assert_close(dual.double(), largest, rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = dual_direction(grad, norm)
    assert torch.equal(again, direction)


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_not_finite_shows(norm: str) -> None:
    for bad in (torch.nan, torch.inf):
        for method in ("svd", "newton_schulz"):
            grad = torch.ones(2, 3)
            grad[0, 1] = bad
            direction, dual = dual_direction(grad, norm, method=method)
            assert not dual.isfinite()
            if norm == "linf" and bad == torch.inf:
                assert torch.equal(direction, torch.ones(2, 3))
            else:
                assert direction[0].isnan().any()


@pytest.mark.untyped
@pytest.mark.parametrize("norm", NORMS)
def test_transforms(norm: str) -> None:
    grads = torch.randn(3, 4, 2, dtype=torch.float64)
    expected = [
        torch.stack(one) for one in zip(*(dual_direction(g, norm) for g in grads), strict=True)
    ]
    batched = torch.func.vmap(lambda grad: dual_direction(grad, norm))(grads)
    torch.testing.assert_close(list(batched), expected)
    compiled = torch.compile(dual_direction, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(grads[0], norm), dual_direction(grads[0], norm))


@pytest.mark.untyped
def test_bad_input() -> None:
    grad = torch.ones(2, 3)
    for norm in ("spectral", "rms", "embedding"):
        with pytest.raises(
            ValueError, match="dual_direction: grad must be of at least 2 dimension"
        ):
            dual_direction(torch.ones(3), norm)
    with pytest.raises(ValueError, match="dual_direction: norm must be one of 'linf', 'l2', 'spec"):
        dual_direction(grad, "l1")
    with pytest.raises(ValueError, match="dual_direction: method must be one of 'svd', 'newton_sc"):
        dual_direction(grad, "rms", method="qr")
    with pytest.raises(ValueError, match="dual_direction: steps must be an int of at least 0"):
        dual_direction(grad, "l2", steps=-1)
    with pytest.raises(ValueError, match="dual_direction: eps must be a finite number above 0"):
        dual_direction(grad, "l2", eps=0.0)
    with pytest.raises(ValueError, match="dual_direction: coefficients must be three numbers"):
        dual_direction(grad, "l2", coefficients=())
    with pytest.raises(TypeError, match="dual_direction: grad must be a floating-point tensor"):
        dual_direction(grad.long(), "l2")


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            dual_direction,
            lambda: {"grad": draw(3, 5)},
            options=(
                *({"norm": norm} for norm in NORMS),
                {"norm": "rms", "method": "newton_schulz"},
            ),
        ),
    ]
