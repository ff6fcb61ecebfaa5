"""The polar factor of a matrix by products alone."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype, without_autocast
from tilework.catalog import implements

__all__ = ["newton_schulz"]

QUINTIC = (3.4445, -4.7750, 2.0315)
_NAME = "newton_schulz"


@implements("Old Optimizer, New Norm: An Anthology", year=2024, arxiv="2409.20325")
def newton_schulz(
    input: Float[Tensor, "*batch rows columns"],
    *,
    steps: int = 5,
    coefficients: Sequence[float] = QUINTIC,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch rows columns"]:
    r"""Move the singular values of matrices towards 1, and keep their singular vectors.

    With :math:`X` = ``input``, transposed if it has more rows than columns, :math:`\epsilon` =
    ``eps`` and :math:`(a, b, c)` = ``coefficients``:

    .. math::

        X \leftarrow X / \max(\lVert X \rVert_F, \epsilon), \qquad \text{then \texttt{steps} times}
        \quad Q = X X^\top, \quad X \leftarrow a X + (b Q + c Q^2) X

    which acts on each singular value as :math:`\sigma \mapsto a \sigma + b \sigma^3 + c \sigma^5`.
    The default brings those that are not tiny at the start to about 0.7 to 1.2 in 5 steps, and
    never to 1; with ``coefficients=(1.5, -0.5, 0.0)`` and more steps the result converges to the
    polar factor :math:`U V^\top`. Singular values of 0 stay 0. Differentiable; autocast does not
    lower the products.

    Args:
        input: Matrices, shape ``(..., m, n)``.
        steps: How many iterations, at least 0.
        coefficients: Those of the odd polynomial of degree 5.
        eps: The least norm that is divided by, above 0.
        dtype: That of the products, such as ``torch.bfloat16``; None for float64 if ``input`` is,
            otherwise float32. The norm is never taken in less than that.

    Returns:
        Of ``input``'s shape and dtype.

    Raises:
        ValueError: ``input`` has fewer than 2 dimensions, or an option is not one of those above.
        TypeError: ``input`` or ``dtype`` is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.optim import newton_schulz
        >>> matrix = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> newton_schulz(matrix, coefficients=(1.5, -0.5, 0.0), steps=12)
        tensor([[ 1.,  0.],
                [ 0., -1.]])

    Deviations:
        Common code works in bfloat16; here that is an option.

    Reference:
        Jeremy Bernstein, Laker Newhouse. Old Optimizer, New Norm: An Anthology. 2024.
        arXiv:2409.20325.
    """
    _checks.floating(_NAME, "input", input)
    if input.dim() < 2:
        raise _checks.bad_value(_NAME, "input", "of shape (..., m, n)", input)
    check_options(_NAME, steps, coefficients, eps)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise _checks.bad_type(_NAME, "dtype", "a floating dtype or None", dtype)
    return _iterate(input, steps, tuple(coefficients), eps, dtype)


def check_options(function: str, steps: int, coefficients: Sequence[float], eps: float) -> None:
    """Refuse options that are out of range."""
    _checks.count(function, "steps", steps, 0)
    if not isinstance(coefficients, Sequence) or len(coefficients) != 3:
        raise _checks.bad_value(function, "coefficients", "three numbers", coefficients)
    for index, coefficient in enumerate(coefficients):
        _checks.finite(function, f"coefficients[{index}]", coefficient)
    _checks.positive(function, "eps", eps)


@without_autocast
def _iterate(
    input: Tensor,
    steps: int,
    coefficients: tuple[float, ...],
    eps: float,
    dtype: torch.dtype | None,
) -> Tensor:
    a, b, c = coefficients
    wide = computation_dtype(input.dtype)
    dtype = wide if dtype is None else dtype
    matrix: Tensor = input.to(torch.promote_types(wide, dtype))
    matrix = matrix / torch.linalg.matrix_norm(matrix, keepdim=True).clamp(min=eps)
    matrix = matrix.to(dtype)
    is_tall = input.shape[-2] > input.shape[-1]
    if is_tall:
        matrix = matrix.mT
    for _ in range(steps):
        gram = matrix @ matrix.mT
        polynomial = b * gram + c * (gram @ gram) if c else b * gram
        matrix = a * matrix + polynomial @ matrix
    return (matrix.mT if is_tall else matrix).to(input.dtype)
