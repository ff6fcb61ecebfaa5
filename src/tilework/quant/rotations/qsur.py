"""How well values fill the space that a grid of quantization spans."""

import math

import torch
from torch import Tensor

from tilework._operators import without_autocast
from tilework.quant._arguments import check_weight, computed
from tilework.quant.rotations.ortho_scale_transform import PAPER

__all__ = ["qsur"]


@PAPER
@torch.no_grad()
@without_autocast
def qsur(input: Tensor) -> Tensor:
    r"""The logarithm of the share that rows take of the space their range spans, per dimension.

    With the mean :math:`\mu` and the eigenvalues :math:`\lambda` of the population covariance of
    the rows, and the volume :math:`V_d = \pi^{d/2} / \Gamma(d/2 + 1)` of the unit ball:

    .. math::

        \frac 1 d \left( \log V_d + \tfrac 1 2 \sum_i \log \lambda_i
        - d \log(2 \max \lvert x - \mu \rvert) \right)

    the ellipsoid of one standard deviation in the cube of the largest deviation. It compares
    transforms of the same rows, and is :math:`-\infty` where they lie in a subspace.

    Args:
        input: Rows, of shape (n, d).

    Returns:
        A scalar, float64 for float64 rows and float32 otherwise.

    Raises:
        ValueError: ``input`` is not a non-empty matrix, or not finite.
        TypeError: ``input`` is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.quant import qsur
        >>> x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> bool(qsur(x) > qsur(x * torch.tensor([1.0, 0.1])))
        True

    Deviations:
        The paper takes the ellipsoid at a quantile and derives its cube; only differences between
        transforms of the same data mean something in both.

    Reference:
        Xing Hu, Yuan Cheng, Dawei Yang, and others. OstQuant: Refining Large Language Model
        Quantization with Orthogonal and Scaling Transformations for Better Distribution Fitting.
        2025. arXiv:2501.13987.
    """
    name = "qsur"
    check_weight(name, input, "input")
    rows, width = input.shape
    centred = input.to(computed(input))
    centred = centred - centred.mean(0)
    sizes = torch.linalg.svdvals(centred)
    # As many as dimensions; what rounding leaves of the others is none.
    least = sizes[0] * max(rows, width) * torch.finfo(centred.dtype).eps
    if rows <= width:
        sizes = torch.zeros_like(sizes)
    logs = sizes.where(sizes > least, 0.0).log().sum() - width * math.log(rows) / 2
    ball = width / 2 * math.log(math.pi) - math.lgamma(width / 2 + 1)
    volume = ball + logs
    span = width * (2 * centred.abs().amax()).log()
    share: Tensor = (volume - span.where(span.isfinite(), 0.0)) / width
    return share
