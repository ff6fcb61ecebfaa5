"""The direction of steepest descent under a norm, and the gradient's dual norm."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype, without_autocast
from tilework.catalog import implements
from tilework.optim.gradients.newton_schulz import QUINTIC, check_options, newton_schulz

__all__ = ["dual_direction"]

NORMS = ("linf", "l2", "spectral", "rms", "embedding")
OF_MATRICES = ("spectral", "rms", "embedding")
METHODS = ("svd", "newton_schulz")
_NAME = "dual_direction"


@implements("Old Optimizer, New Norm: An Anthology", year=2024, arxiv="2409.20325")
def dual_direction(
    grad: Float[Tensor, "*shape"],
    norm: str,
    *,
    method: str = "svd",
    steps: int = 5,
    coefficients: Sequence[float] = QUINTIC,
    eps: float = 1e-7,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, ""]]:
    r"""Direction of norm 1 that a gradient grows fastest in, and how fast.

    With :math:`G` = ``grad``, the direction and the dual norm are

    .. math::

        T = \operatorname*{arg\,max}_{\lVert T \rVert \le 1} \langle G, T \rangle, \qquad
        \lVert G \rVert_* = \langle G, T \rangle

    Tensors of more than 2 dimensions count as matrices, with rows along the first dimension. With
    the singular value decomposition :math:`G = U \Sigma V^\top` of a matrix with :math:`m` rows
    :math:`G_i` of size :math:`n`, the norms :math:`\lVert T \rVert` and directions :math:`T` are

    - ``"linf"``: :math:`\max_{ij} |T_{ij}|` and :math:`\operatorname{sign}(G)`,
    - ``"l2"``: :math:`\lVert T \rVert_F` and :math:`G / \lVert G \rVert_F`,
    - ``"spectral"``: :math:`\sigma_{\max}(T)` and :math:`U V^\top`,
    - ``"rms"``: :math:`\sqrt{n / m}\, \sigma_{\max}(T)` and :math:`\sqrt{m / n}\, U V^\top`,
    - ``"embedding"``: :math:`\max_i \lVert T_i \rVert_2 / \sqrt n` and the rows
      :math:`\sqrt n\, G_i / \lVert G_i \rVert_2`.

    ``"rms"`` suits linear layers, ``"embedding"`` tables with a row for each token.
    :math:`U V^\top` is restricted to the singular values above :math:`\max(m, n)` machine epsilons
    times the largest. A gradient, or row, of zeros has the direction 0. Computed in float32
    (float64 for float64).

    Args:
        grad: A gradient of any shape; of at least 2 dimensions for the last three norms.
        norm: ``"linf"``, ``"l2"``, ``"spectral"``, ``"rms"`` or ``"embedding"``.
        method: For ``"spectral"`` and ``"rms"``: ``"svd"``, or ``"newton_schulz"``, which takes
            :func:`newton_schulz` of ``grad`` for :math:`U V^\top`. Its singular values are about 1,
            and so are the norm and the dual norm about those above.
        steps: As in :func:`newton_schulz`.
        coefficients: As in :func:`newton_schulz`.
        eps: As in :func:`newton_schulz`.

    Returns:
        The direction, of ``grad``'s shape and dtype, and the dual norm, a scalar of the dtype of
        the computation.

    Raises:
        ValueError: ``grad`` has too few dimensions, or an option is not one of those above.
        TypeError: ``grad`` is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.optim import dual_direction
        >>> direction, dual = dual_direction(torch.tensor([[3.0, 0.0], [0.0, -2.0]]), "spectral")
        >>> direction
        tensor([[ 1.,  0.],
                [ 0., -1.]])
        >>> dual
        tensor(5.)

    Reference:
        Jeremy Bernstein, Laker Newhouse. Old Optimizer, New Norm: An Anthology. 2024.
        arXiv:2409.20325.
    """
    _checks.one_of(_NAME, "norm", norm, NORMS)
    _checks.one_of(_NAME, "method", method, METHODS)
    check_options(_NAME, steps, coefficients, eps)
    _checks.floating(_NAME, "grad", grad)
    if norm in OF_MATRICES and grad.dim() < 2:
        raise _checks.bad_value(_NAME, "grad", f'of at least 2 dimensions for "{norm}"', grad)

    values, scale = grad.to(computation_dtype(grad.dtype)), 1.0
    if norm == "linf":
        direction, dual = values.sign().where(~values.isnan(), torch.nan), values.abs().sum()
    elif norm == "l2":
        dual = torch.linalg.vector_norm(values)
        direction = values / dual.where(dual != 0, 1)
    elif norm == "embedding":
        rows = values.flatten(1)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        direction, dual = rows / norms.where(norms != 0, 1), norms.sum()
        scale = rows.shape[1] ** 0.5
    else:
        matrix = values.flatten(1)
        if method == "svd":
            direction, dual = _polar_factor(matrix)
        else:
            direction = newton_schulz(matrix, steps=steps, coefficients=coefficients, eps=eps)
            dual = (matrix * direction).sum()
        if norm == "rms":
            scale = (matrix.shape[0] / max(matrix.shape[1], 1)) ** 0.5
    return (scale * direction).reshape(grad.shape).to(grad.dtype), scale * dual


@without_autocast
def _polar_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The polar factor on the range of a matrix, and the sum of the singular values."""
    is_finite = matrix.isfinite().all()  # the decomposition refuses others
    u, values, vh = torch.linalg.svd(matrix.where(is_finite, 0), full_matrices=False)
    least = max(matrix.shape) * torch.finfo(matrix.dtype).eps * values[:1]
    factor = (u * (values > least)) @ vh
    return factor.where(is_finite, torch.nan), values.sum().where(is_finite, torch.nan)
