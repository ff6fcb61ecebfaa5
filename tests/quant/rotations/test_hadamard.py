"""Hadamard's matrices against SciPy's, and random rotations by their moments."""

from typing import Any

import pytest
import scipy.linalg
import scipy.stats
import torch

from tilework.quant import (
    hadamard_matrix,
    hadamard_transform,
    random_hadamard_matrix,
    random_orthogonal_matrix,
)

import samples
from calls import Call, draw


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            hadamard_transform,
            lambda: {"input": draw(3, 8)},
            differentiable=("input",),
            sizes={8: 16},
            options=({"block_size": 4},),
        )
    ]


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_the_matrix(n: int) -> None:
    expected = torch.from_numpy(scipy.linalg.hadamard(n)).double()
    assert torch.equal(hadamard_matrix(n, normalized=False, dtype=torch.float64), expected)
    normalized = hadamard_matrix(n, dtype=torch.float64)
    torch.testing.assert_close(normalized, expected / n**0.5, rtol=1e-15, atol=0)
    assert hadamard_matrix(n).dtype == torch.get_default_dtype()
    assert hadamard_matrix(n, device="meta").shape == (n, n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [None, 1, 2, 8])
def test_the_transform(block_size: int | None, dtype: torch.dtype) -> None:
    input = torch.randn(2, 3, 16).to(dtype)
    size = block_size or 16
    matrix = torch.block_diag(
        *[torch.from_numpy(scipy.linalg.hadamard(size)).double() / size**0.5] * (16 // size)
    )
    result = hadamard_transform(input, block_size=block_size)
    assert result.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), input.double() @ matrix, rtol=2 * eps, atol=8 * eps)
    again = hadamard_transform(result, block_size=block_size)
    torch.testing.assert_close(again.double(), input.double(), rtol=4 * eps, atol=16 * eps)


def test_gradients_and_empty_input() -> None:
    input = draw(2, 8).requires_grad_()
    assert torch.autograd.gradcheck(hadamard_transform, (input,), check_forward_ad=True)
    assert hadamard_transform(torch.empty(0, 8)).shape == (0, 8)
    assert hadamard_transform(torch.ones(4)).tolist() == [2, 0, 0, 0]
    strided = draw(8, 6).T
    assert torch.equal(hadamard_transform(strided), hadamard_transform(strided.contiguous()))


def test_random_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = hadamard_matrix(8, dtype=torch.float64)
    positive = torch.zeros(8)
    for _ in range(400):
        matrix = random_hadamard_matrix(8, generator=generator, dtype=torch.float64)
        signs = (matrix * plain).sum(1)
        torch.testing.assert_close(signs.abs(), torch.ones(8, dtype=torch.float64))
        torch.testing.assert_close(matrix, signs.sign().unsqueeze(1) * plain)
        positive += signs > 0
    assert ((positive - 200).abs() < 5 * 10).all()


@pytest.mark.parametrize("n", [1, 3, 10])
def test_random_matrices_are_orthogonal(n: int) -> None:
    matrix = random_orthogonal_matrix(n, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))
    assert random_orthogonal_matrix(n, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_random_matrices_are_of_the_law_of_haar() -> None:
    """The angle of a random rotation's first column is uniform, and half are reflections."""
    generator = torch.Generator().manual_seed(0)
    draws = [
        random_orthogonal_matrix(2, generator=generator, dtype=torch.float64) for _ in range(2000)
    ]
    angles = torch.stack([torch.atan2(one[1, 0], one[0, 0]) for one in draws])
    uniform = scipy.stats.uniform(-torch.pi, 2 * torch.pi).cdf
    assert scipy.stats.kstest(angles.numpy(), uniform).pvalue > 1e-3
    reflections = sum(int(torch.linalg.det(one) < 0) for one in draws)
    assert abs(reflections - 1000) < 5 * 22.4
    # What LAPACK returns is not: the diagonal of its triangle has one sign.
    raw = [
        torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64, generator=generator))[0]
        for _ in range(2000)
    ]
    angles = torch.stack([torch.atan2(one[1, 0], one[0, 0]) for one in raw])
    assert scipy.stats.kstest(angles.numpy(), uniform).pvalue < 1e-6


@pytest.mark.parametrize("function", [random_hadamard_matrix, random_orthogonal_matrix])
def test_generators_decide(function: Any) -> None:
    one, same, other = (
        function(8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.untyped
def test_bad_input() -> None:
    for function in (hadamard_matrix, random_hadamard_matrix):
        for n in (0, -2, 3, 12):
            with pytest.raises(ValueError, match=rf"^{function.__name__}: n must be"):
                function(n)
        with pytest.raises(TypeError, match=rf"^{function.__name__}: n must be an int"):
            function(2.0)
    with pytest.raises(ValueError, match=r"^random_orthogonal_matrix: n must be"):
        random_orthogonal_matrix(0)
    for change, error, message in (
        ({"block_size": 3}, ValueError, "block_size must be a power of two"),
        ({"block_size": 16}, ValueError, "input must be of a multiple of 16"),
        ({"block_size": 2.0}, TypeError, "block_size must be an int"),
        ({"input": torch.ones(3)}, ValueError, "input's last size must be a power of two"),
        ({"input": torch.tensor(1.0)}, ValueError, "input must be of at least one dimension"),
        ({"input": torch.ones(4).long()}, TypeError, "input must be a floating-point tensor"),
    ):
        with pytest.raises(error, match=rf"^hadamard_transform: {message}"):
            hadamard_transform(**({"input": torch.ones(8)} | change))
