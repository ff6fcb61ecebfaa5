"""Newton-Schulz iterations, against the polynomial of the singular values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tilework.optim import newton_schulz

import samples
from calls import Call, draw
from helpers import FLOATING, HALF, assert_exact, dtype_name

CUBIC = (1.5, -0.5, 0.0)
DEFAULT = (3.4445, -4.7750, 2.0315)
SHAPES = ((1, 1), (3, 5), (7, 2), (2, 4, 3), (2, 1, 3, 6))


def by_singular_values(
    matrix: Tensor, steps: int = 5, coefficients: tuple[float, ...] = DEFAULT
) -> Tensor:
    """The odd polynomial of each singular value in float64."""
    u, values, v = np.linalg.svd(matrix.detach().double().numpy(), full_matrices=False)
    size = np.sqrt((values**2).sum(-1, keepdims=True))
    values = values / np.where(size > 0, size, 1)
    a, b, c = coefficients
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return torch.from_numpy((u * values[..., None, :]) @ v)


def composed(matrix: Tensor) -> Tensor:
    """The default iteration in operations of one dtype."""
    a, b, c = DEFAULT
    matrix = matrix / matrix.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = matrix @ matrix.mT
        matrix = a * matrix + (b * gram + c * (gram @ gram)) @ matrix
    return matrix


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_polynomial(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64)
    before = matrix.clone()
    for steps in (0, 1, 5):
        for coefficients in (DEFAULT, CUBIC, (2.0, -1.5, 0.5)):
            actual = newton_schulz(matrix, steps=steps, coefficients=coefficients)
            truth = by_singular_values(matrix, steps, coefficients)
            torch.testing.assert_close(actual, truth, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(newton_schulz(matrix), by_singular_values(matrix))
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("shape", [(4, 6), (9, 4)])
def test_error(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape).to(dtype)
    actual = newton_schulz(matrix)
    assert actual.dtype == dtype
    low = torch.float32 if dtype in (torch.float64, *HALF) else dtype
    composition = composed(matrix.to(low)).to(torch.float32 if dtype == torch.float64 else dtype)
    assert_exact(actual, composition, by_singular_values(matrix))


def test_dtype_of_the_products() -> None:
    matrix = torch.randn(5, 8, dtype=torch.float64)
    truth = by_singular_values(matrix)
    for dtype, least, most in (
        (torch.float64, 0.0, 1e-12),
        (torch.float32, 1e-9, 1e-5),
        (torch.bfloat16, 1e-4, 0.1),
        (torch.float16, 1e-5, 0.02),
    ):
        actual = newton_schulz(matrix, dtype=dtype)
        assert actual.dtype == torch.float64
        assert least <= (actual - truth).abs().max() < most
    large = torch.full((200, 200), 60000.0, dtype=torch.float16)  # whose norm float16 cannot hold
    for dtype in (None, torch.float16):
        actual = newton_schulz(large, dtype=dtype)
        torch.testing.assert_close(actual.double(), by_singular_values(large), rtol=0.05, atol=1e-3)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32), st.floats(0.3, 3))
def test_cubic_iterations_give_the_polar_factor(m: int, n: int, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = min(m, n)
    u = torch.linalg.qr(torch.randn(m, size, generator=generator).double()).Q
    v = torch.linalg.qr(torch.randn(n, size, generator=generator).double()).Q
    values = torch.logspace(0, -spread, size).double()
    actual = newton_schulz((u * values) @ v.mT, coefficients=CUBIC, steps=40)
    torch.testing.assert_close(actual, u @ v.mT)
    rotation = torch.linalg.qr(torch.randn(m, m, generator=generator).double()).Q
    matrix = torch.randn(m, n, generator=generator).double()
    torch.testing.assert_close(newton_schulz(rotation @ matrix), rotation @ newton_schulz(matrix))
    torch.testing.assert_close(newton_schulz(matrix.mT), newton_schulz(matrix).mT)
    torch.testing.assert_close(newton_schulz(3 * matrix), newton_schulz(matrix))


def test_the_default_brings_singular_values_near_1() -> None:
    values = torch.linalg.svdvals(newton_schulz(torch.randn(20, 60, dtype=torch.float64)))
    assert values.min() > 0.65
    assert values.max() < 1.25


def test_without_full_rank() -> None:
    assert torch.equal(newton_schulz(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    matrix = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 4.0)).double()
    unit = matrix / matrix.norm()
    actual = newton_schulz(matrix, coefficients=CUBIC, steps=30)
    torch.testing.assert_close(actual, unit)
    batch = torch.stack([torch.zeros_like(matrix), matrix])
    torch.testing.assert_close(newton_schulz(batch)[1], newton_schulz(matrix))
    tiny = 1e-3 * torch.eye(2).double()
    torch.testing.assert_close(newton_schulz(tiny, steps=0, eps=0.5), tiny / 0.5)


def test_strides_and_sizes() -> None:
    matrix = torch.randn(4, 6, 3).double().permute(2, 0, 1)[:, :, ::2]
    torch.testing.assert_close(newton_schulz(matrix), newton_schulz(matrix.contiguous()))
    row = torch.randn(1, 3).double()
    torch.testing.assert_close(
        newton_schulz(row.expand(2, 3)), by_singular_values(row.expand(2, 3))
    )
    for shape in ((0, 3), (3, 0), (0, 2, 3), (2, 0, 0)):
        assert newton_schulz(torch.zeros(shape)).shape == shape


def test_products_are_of_the_smaller_size() -> None:
    counts = []
    for shape in ((3, 50), (50, 3)):
        with FlopCounterMode(display=False) as counter:
            newton_schulz(torch.randn(shape))
        counts.append(counter.get_total_flops())
    assert counts == [5 * 2 * (2 * 3 * 3 * 50 + 3 * 3 * 3)] * 2


def test_what_is_not_finite_shows() -> None:
    for bad in (torch.nan, torch.inf):
        matrices = torch.ones(2, 2, 3)
        matrices[0, 1, 1] = bad
        actual = newton_schulz(matrices)
        assert actual[0].isnan().all()
        assert actual[1].isfinite().all()


def test_autocast_lowers_nothing() -> None:
    matrix = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        actual = newton_schulz(matrix)
    assert torch.equal(actual, newton_schulz(matrix))


@pytest.mark.untyped
def test_transforms() -> None:
    for shape in ((2, 3), (3, 2)):
        matrix = torch.randn(shape, dtype=torch.float64, requires_grad=True)

        def run(matrix: Tensor) -> Tensor:
            return newton_schulz(matrix, steps=2)

        assert torch.autograd.gradcheck(run, matrix)
        assert torch.autograd.gradgradcheck(run, matrix)
        compiled = torch.compile(newton_schulz, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(matrix), newton_schulz(matrix))
        batch = torch.randn(3, *shape, dtype=torch.float64)
        torch.testing.assert_close(torch.func.vmap(newton_schulz)(batch), newton_schulz(batch))


@pytest.mark.untyped
def test_bad_input() -> None:
    matrix = torch.ones(2, 3)
    with pytest.raises(ValueError, match="newton_schulz: input must be of shape"):
        newton_schulz(torch.ones(3))
    with pytest.raises(TypeError, match="newton_schulz: input must be a floating-point tensor"):
        newton_schulz(matrix.int())
    with pytest.raises(ValueError, match="newton_schulz: steps must be an int of at least 0"):
        newton_schulz(matrix, steps=-1)
    with pytest.raises(TypeError, match="newton_schulz: steps must be an int"):
        newton_schulz(matrix, steps=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="newton_schulz: coefficients must be three numbers"):
        newton_schulz(matrix, coefficients=(1.5, -0.5))
    with pytest.raises(ValueError, match=r"newton_schulz: coefficients\[1\] must be a finite numb"):
        newton_schulz(matrix, coefficients=(1.5, math.nan, 0.0))
    for eps in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="newton_schulz: eps must be a finite number above 0"):
            newton_schulz(matrix, eps=eps)
    for dtype in (torch.int32, torch.complex64, "bfloat16"):
        with pytest.raises(TypeError, match="newton_schulz: dtype must be a floating dtype"):
            newton_schulz(matrix, dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional"):
        newton_schulz(matrix, 5)  # type: ignore[misc]
    scalars = {
        "steps": np.int64(3),
        "eps": np.float64(1e-7),
        "coefficients": np.float64(CUBIC).tolist(),
    }
    assert torch.equal(
        newton_schulz(matrix, **scalars), newton_schulz(matrix, steps=3, coefficients=CUBIC)
    )


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(newton_schulz, lambda: {"input": draw(2, 3, 5)}, differentiable=("input",)),
        Call(newton_schulz, lambda: {"input": draw(5, 3)}, differentiable=("input",)),
    ]
