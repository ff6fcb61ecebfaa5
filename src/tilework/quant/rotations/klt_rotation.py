"""MambaQuant: rotations that level the variances of channels, and factors for these."""

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import implements
from tilework.quant._arguments import check_weight, computed, rows_of
from tilework.quant.rotations.hadamard import hadamard_transform

__all__ = ["klt_rotation", "smooth_factors"]

PAPER = implements(
    "MambaQuant: Quantizing the Mamba Family with Variance Aligned Rotation Methods",
    year=2025,
    arxiv="2501.13484",
)
_LEAST = 1e-5


@PAPER
@torch.no_grad()
@without_autocast
def klt_rotation(input: Tensor, *, center: bool = True) -> Tensor:
    r"""The rotation after which all channels of the calibration rows have the same variance.

    With the :math:`n` rows :math:`x` of ``input`` and their mean :math:`\mu`, or :math:`\mu = 0`
    without ``center``:

    .. math::

        C = \frac{1}{n - 1} \sum (x - \mu)(x - \mu)^\top = K \Lambda K^\top, \qquad
        R = K H_d

    with eigenvalues in falling order, each eigenvector such that its entry of largest magnitude,
    the first one of several, is positive, and :func:`hadamard_matrix` :math:`H_d`. A layer becomes
    :math:`(x R)(W R)^\top`.

    Args:
        input: Rows, of shape (..., d), with d a power of two.
        center: Whether the mean is taken away.

    Returns:
        The rotation, of shape (d, d), float64 for float64 rows and otherwise float32.

    Raises:
        ValueError: ``d`` is not a power of two, or there are fewer than two rows, or they are not
            finite.
        TypeError: ``input`` is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.quant import klt_rotation
        >>> x = torch.randn(100, 4) * torch.tensor([9.0, 1.0, 1.0, 0.1])
        >>> variances = (x @ klt_rotation(x)).var(0)
        >>> torch.allclose(variances, variances.mean().expand(4), rtol=1e-3)
        True

    Deviations:
        The released code orthogonalizes eigenvectors once more, which changes nothing.

    Reference:
        Zukang Xu, Yuxuan Yue, Xing Hu, and others. MambaQuant: Quantizing the Mamba Family with
        Variance Aligned Rotation Methods. 2025. arXiv:2501.13484.
    """
    name = "klt_rotation"
    _checks.floating(name, "input", input)
    width = input.shape[-1] if input.dim() else 0
    if not width or width & (width - 1):
        raise _checks.bad_value(name, "input", "of a last size that is a power of two", input)
    rows = rows_of(name, input, width)
    if len(rows) < 2:
        raise _checks.bad_value(name, "input", "of at least two rows", input)
    rows = rows.to(computed(input))
    if center:
        rows = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(rows.mT @ rows / (len(rows) - 1))
    vectors = vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return hadamard_transform(vectors * torch.ones_like(largest).copysign(largest))


@PAPER
@torch.no_grad()
def smooth_factors(input: Tensor, weight: Tensor, *, alpha: float = 0.5) -> Tensor:
    r"""What channels of inputs are divided by, and columns of weights multiplied.

    .. math::

        s_j = \max\left( \frac{\max \lvert x_j \rvert^\alpha}
        {\max(\max_o \lvert W_{oj} \rvert, 10^{-5})^{1 - \alpha}}, 10^{-5} \right)

    Args:
        input: Inputs :math:`x`, of shape (..., in).
        weight: Weights :math:`W`, of shape (out, in).
        alpha: How much of the range goes to the weights, from 0 to 1.

    Returns:
        Factors of shape (in,), float64 if a tensor is, otherwise float32.

    Raises:
        ValueError: A tensor is empty, not finite or of a shape that does not fit, or ``alpha`` is
            out of its range.
        TypeError: A tensor is not of a real floating dtype, or ``alpha`` no number.

    Example:
        >>> import torch
        >>> from tilework.quant import smooth_factors
        >>> smooth_factors(torch.tensor([[16.0, 1.0]]), torch.tensor([[1.0, 4.0]]))
        tensor([4.0000, 0.5000])

    Reference:
        As :func:`klt_rotation`.
    """
    name = "smooth_factors"
    check_weight(name, weight)
    rows = rows_of(name, input, weight.shape[1])
    _checks.fraction(name, "alpha", alpha)
    _checks.same_device(name, input=input, weight=weight)
    dtype = computed(input, weight)
    inputs, weights = (one.to(dtype).abs().amax(0) for one in (rows, weight))
    return (inputs**alpha / weights.clamp(min=_LEAST) ** (1 - alpha)).clamp(min=_LEAST)
