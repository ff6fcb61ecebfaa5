"""Orthogonal matrices that spread outliers: Hadamard's, and random ones."""

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import without_paper

__all__ = [
    "hadamard_matrix",
    "hadamard_transform",
    "random_hadamard_matrix",
    "random_orthogonal_matrix",
]

_REASON = "the rotations that quantization spreads outliers by"


def check_power_of_two(name: str, argument: str, value: int) -> None:
    """Refuse what is not 1, 2, 4, 8, ..."""
    _checks.count(name, argument, value)
    if value & (value - 1):
        raise _checks.bad_value(name, argument, "a power of two", value)


@without_paper(_REASON)
def hadamard_matrix(
    n: int,
    *,
    normalized: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Sylvester's matrix of ones of both signs with orthogonal rows.

    .. math::

        H_1 = (1), \qquad H_{2 n} = \begin{pmatrix} H_n & H_n \\ H_n & -H_n \end{pmatrix}

    It is symmetric; divided by :math:`\sqrt n` it is its own inverse.

    Args:
        n: Its size, a power of two.
        normalized: Whether it is divided by :math:`\sqrt n`.
        dtype: Of the result, by default PyTorch's default.
        device: Of the result.

    Returns:
        The matrix, of shape (n, n).

    Raises:
        ValueError: ``n`` is not a power of two.
        TypeError: ``n`` is not an int.

    Example:
        >>> from tilework.quant import hadamard_matrix
        >>> hadamard_matrix(2, normalized=False)
        tensor([[ 1.,  1.],
                [ 1., -1.]])

    Reference:
        Albert Tseng, Jerry Chee, Qingyao Sun, Volodymyr Kuleshov, Christopher De Sa. QuIP#: Even
        Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks. 2024.
        arXiv:2402.04396.
    """
    check_power_of_two("hadamard_matrix", "n", n)
    result = torch.ones(1, 1, dtype=torch.float64, device=device)
    while len(result) < n:
        upper = torch.cat([result, result], 1)
        result = torch.cat([upper, torch.cat([result, -result], 1)])
    if normalized:
        result = result / n**0.5
    return result.to(dtype or torch.get_default_dtype())


@without_paper(_REASON)
def hadamard_transform(input: Tensor, *, block_size: int | None = None) -> Tensor:
    r"""Blocks of the last dimension times the normalized matrix of :func:`hadamard_matrix`.

    It takes :math:`O(n \log n)` operations, is its own inverse and gradient, and keeps lengths.

    Args:
        input: Values, of shape (..., n).
        block_size: The length of a block, a power of two that divides n; by default n.

    Returns:
        Values of the shape and dtype of ``input``, computed in float32 at least.

    Raises:
        ValueError: ``block_size`` is not a power of two or does not divide the last dimension.
        TypeError: ``input`` is not of a real floating dtype, or ``block_size`` not an int.

    Example:
        >>> import torch
        >>> from tilework.quant import hadamard_transform
        >>> hadamard_transform(torch.tensor([4.0, 0.0, 0.0, 0.0]))
        tensor([2., 2., 2., 2.])

    Reference:
        Albert Tseng, Jerry Chee, Qingyao Sun, Volodymyr Kuleshov, Christopher De Sa. QuIP#: Even
        Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks. 2024.
        arXiv:2402.04396.
    """
    name = "hadamard_transform"
    _checks.floating(name, "input", input)
    if not input.dim():
        raise _checks.bad_value(name, "input", "of at least one dimension", input)
    length = input.shape[-1]
    size = length if block_size is None else block_size
    check_power_of_two(name, "block_size" if block_size is not None else "input's last size", size)
    if length % size:
        raise _checks.bad_value(name, "input", f"of a multiple of {size} in its last size", input)
    blocks = input.to(computation_dtype(input.dtype)).reshape(
        *input.shape[:-1], length // size, size
    )
    half = 1
    while half < size:
        pairs = blocks.reshape(*blocks.shape[:-1], size // (2 * half), 2, half)
        first, second = pairs.unbind(-2)
        blocks = torch.stack([first + second, first - second], -2).reshape(blocks.shape)
        half *= 2
    result: Tensor = blocks / size**0.5
    return result.reshape(input.shape).to(input.dtype)


@without_paper(_REASON)
def random_hadamard_matrix(
    n: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""The normalized matrix of :func:`hadamard_matrix`, its rows with random signs.

    .. math::

        \mathrm{diag}(\sigma) H_n, \qquad \sigma_i = \pm 1 \text{ with equal probability}

    Args:
        n: Its size, a power of two.
        generator: Draws the signs.
        dtype: Of the result, by default PyTorch's default.
        device: Of the result.

    Returns:
        An orthogonal matrix, of shape (n, n).

    Raises:
        ValueError: ``n`` is not a power of two.
        TypeError: ``n`` is not an int.

    Example:
        >>> import torch
        >>> from tilework.quant import random_hadamard_matrix
        >>> matrix = random_hadamard_matrix(4, generator=torch.Generator().manual_seed(0))
        >>> matrix @ matrix.T
        tensor([[1., 0., 0., 0.],
                [0., 1., 0., 0.],
                [0., 0., 1., 0.],
                [0., 0., 0., 1.]])

    Reference:
        Albert Tseng, Jerry Chee, Qingyao Sun, Volodymyr Kuleshov, Christopher De Sa. QuIP#: Even
        Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks. 2024.
        arXiv:2402.04396.
    """
    check_power_of_two("random_hadamard_matrix", "n", n)
    place = device if generator is None else generator.device
    signs = torch.randint(0, 2, (n, 1), generator=generator, device=place) * 2 - 1
    matrix = hadamard_matrix(n, dtype=dtype, device=device)
    return signs.to(matrix) * matrix


@without_paper(_REASON)
def random_orthogonal_matrix(
    n: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """An orthogonal matrix, all alike likely: by the law of Haar.

    Args:
        n: Its size, at least 1.
        generator: Draws it.
        dtype: Of the result, by default PyTorch's default.
        device: Of the result.

    Returns:
        An orthogonal matrix, of shape (n, n).

    Raises:
        ValueError: ``n`` is below 1.
        TypeError: ``n`` is not an int.

    Example:
        >>> import torch
        >>> from tilework.quant import random_orthogonal_matrix
        >>> matrix = random_orthogonal_matrix(3, generator=torch.Generator().manual_seed(0))
        >>> torch.dist(matrix @ matrix.T, torch.eye(3)) < 1e-6
        tensor(True)

    Reference:
        Francesco Mezzadri. How to generate random matrices from the classical compact groups. 2006.
        arXiv:math-ph/0609050.
    """
    _checks.count("random_orthogonal_matrix", "n", n)
    dtype = dtype or torch.get_default_dtype()
    place = device if generator is None else generator.device
    normal = torch.randn(n, n, generator=generator, dtype=computation_dtype(dtype), device=place)
    matrix, triangle = torch.linalg.qr(normal)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(matrix)
    result: Tensor = matrix * signs
    return result.to(dtype=dtype, device=device)
