"""Gradients without their radial part, and parameters of a given norm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tilework.optim import renorm_, tangent_project_

from helpers import FLOATING, assert_exact, dtype_name

SHAPES = ((7,), (3, 5), (), (0,), (1,), (4, 3, 2))
dtypes = pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)


def drawn(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype))
        parameter.grad = torch.randn(shape, dtype=torch.float64).to(dtype)
        parameters.append(parameter)
    return parameters


def dot(one: Tensor, other: Tensor) -> Tensor:
    products = [x * y for x, y in zip(one.flatten(), other.flatten(), strict=True)]
    return sum(products, torch.zeros((), dtype=one.dtype))


@dtypes
def test_projected_gradients(dtype: torch.dtype) -> None:
    parameters = drawn(dtype)
    narrow, computed = (
        (torch.float32, torch.float64) if dtype == torch.float64 else (dtype, torch.float32)
    )
    results: list[list[Tensor]] = []
    for wide in (torch.float32, torch.float64):
        gradients, parts = [], []
        for parameter in parameters:
            p, g = parameter.detach().to(wide), parameter.grad.to(wide)  # type: ignore[union-attr]
            square = dot(p, p)
            gradients.append((g - dot(g, p) / square * p if square > 0 else g).flatten())
            parts.append(dot(g, p) / square**0.5 if square > 0 else torch.zeros((), dtype=wide))
        results.append([torch.cat(gradients), torch.stack(parts)])
    kept = [p.grad for p in parameters]
    parts = tangent_project_(iter(parameters))
    assert all(p.grad is grad for p, grad in zip(parameters, kept, strict=True))
    assert parts.dtype == computed
    flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
    assert_exact(flat, results[0][0].to(narrow), results[1][0])
    assert_exact(parts, results[0][1], results[1][1])


@given(st.integers(0, 2**31), st.floats(1e-30, 1e30))
def test_nothing_is_left_along_the_parameter(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, g = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    parameter = torch.nn.Parameter(scale * p)
    parameter.grad = g.clone()
    tangent_project_(parameter)
    assert abs(float((parameter.grad * p).sum())) <= 1e-14 * float(p.norm() * g.norm())
    torch.testing.assert_close(
        float((g - parameter.grad).norm()), abs(float((g * p).sum() / p.norm()))
    )
    again = parameter.grad.clone()
    tangent_project_(parameter)
    torch.testing.assert_close(parameter.grad, again, rtol=1e-13, atol=1e-14)


def test_parameters_without_gradient_are_skipped_and_zeros_left_alone() -> None:
    zeros, without = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.ones(3))
    zeros.grad = torch.ones(3)
    assert tangent_project_([zeros, without]).tolist() == [0.0]
    assert torch.equal(zeros.grad, torch.ones(3))
    assert without.grad is None
    assert tangent_project_([]).shape == (0,)


@dtypes
@pytest.mark.parametrize(
    "kind",
    [list, tuple, torch.tensor, lambda norms: [torch.tensor(norm) for norm in norms]],
    ids=["list", "tuple", "tensor", "tensors"],
)
def test_renormed(dtype: torch.dtype, kind: Callable[[Any], Any]) -> None:
    parameters = drawn(dtype)
    norms = [0.5 * index for index in range(len(parameters))]
    narrow = torch.float32 if dtype == torch.float64 else dtype
    results: list[list[Tensor]] = []
    for wide in (torch.float32, torch.float64):
        news, sizes = [], []
        for parameter, norm in zip(parameters, norms, strict=True):
            p = parameter.detach().to(wide)
            size = dot(p, p) ** 0.5
            sizes.append(size)
            news.append((p * (norm / size) if size > 0 else p).flatten())
        results.append([torch.cat(news), torch.stack(sizes)])
    gradients = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
    before = renorm_(parameters, kind(norms))
    flat = torch.cat([p.detach().flatten() for p in parameters])
    assert_exact(flat, results[0][0].to(narrow), results[1][0])
    assert_exact(before, results[0][1], results[1][1])
    assert all(
        torch.equal(p.grad, g)  # type: ignore[arg-type]
        for p, g in zip(parameters, gradients, strict=True)
    )


def test_renorm_leaves_zeros_alone() -> None:
    zeros = torch.nn.Parameter(torch.zeros(3))
    assert renorm_(zeros, [2.0]).tolist() == [0.0]
    assert not zeros.any()
    assert renorm_([], []).shape == (0,)


@given(st.floats(1e-30, 1e30), st.floats(1e-30, 1e30))
def test_small_and_large_norms(before: float, norm: float) -> None:
    parameter = torch.nn.Parameter(before * torch.tensor([0.6, 0.8], dtype=torch.float64))
    old = renorm_(parameter, [norm])
    torch.testing.assert_close(old.item(), before, rtol=1e-14, atol=0)
    expected = norm * torch.tensor([0.6, 0.8], dtype=torch.float64)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-14, atol=0)


@pytest.mark.untyped
def test_refuses() -> None:
    parameter, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    for function, more in ((tangent_project_, ()), (renorm_, ([1.0],))):
        name = f"^{function.__name__}: "
        with pytest.raises(TypeError, match=name + "parameters must be a tensor or an iterable"):
            function(3, *more)
        with pytest.raises(TypeError, match=name + r"parameters\[0\] must be a floating-point"):
            function([torch.ones(3, dtype=torch.int64)], *more)
    parameter.grad = torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match=r"parameters\[0\].grad must be a dense tensor"):
        tangent_project_(parameter)
    for norms in ([1.0], [1.0] * 3, torch.ones(3), torch.ones(2, 1), torch.ones(())):
        with pytest.raises(ValueError, match="renorm_: norms must be 2, one for each parameter"):
            renorm_([parameter, other], norms)
    with pytest.raises(TypeError, match="renorm_: norms must be a sequence or a tensor, got 1"):
        renorm_(parameter, 1)
    for norm in (-1.0, torch.tensor(-1.0), float("nan")):
        with pytest.raises(ValueError, match=r"renorm_: norms\[1\] must be a finite number of at"):
            renorm_([parameter, other], [1.0, norm])
    with pytest.raises(ValueError, match=r"renorm_: norms\[1\] must be without dimensions"):
        renorm_([parameter, other], [1.0, torch.ones(1)])
    with pytest.raises(TypeError, match=r"renorm_: norms\[0\] must be a number, got '1'"):
        renorm_(parameter, ["1"])
    assert torch.equal(parameter, torch.ones(3))
