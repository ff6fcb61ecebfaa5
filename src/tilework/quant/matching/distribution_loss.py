"""The distance of means and variances of channels."""

from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.quant._arguments import computed

__all__ = ["distribution_loss"]

PAPER = implements(
    "Norm Tweaking: High-performance Low-bit Quantization of Large Language Models",
    year=2023,
    arxiv="2309.02784",
)


@PAPER
def distribution_loss(input: Tensor, target: Tensor) -> Tensor:
    r"""The mean distance of the means and of the variances of channels.

    .. math::

        \frac 1 C \sum_c \left( \lvert \mu_c - \mu'_c \rvert
        + \lvert \sigma_c^2 - \sigma_c'^2 \rvert \right)

    with the mean and the population variance over all dimensions but the last of ``input`` and
    ``target``.

    Args:
        input: Activations of shape (..., C).
        target: Those that are wanted, of shape (..., C); they have no gradient.

    Returns:
        A scalar, float64 if a tensor is and otherwise float32.

    Raises:
        ValueError: A tensor is empty or has other channels than the other.
        TypeError: A tensor is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.quant import distribution_loss
        >>> distribution_loss(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [0.0]]))
        tensor(3.)

    Deviations:
        Variances are divided by the number of rows, so that one row has the variance 0.

    Reference:
        Liang Li, Qingyuan Li, Bo Zhang, Xiangxiang Chu. Norm Tweaking: High-performance Low-bit
        Quantization of Large Language Models. 2023. arXiv:2309.02784.
    """
    name = "distribution_loss"
    for argument, tensor in (("input", input), ("target", target)):
        _checks.floating(name, argument, tensor)
        if not tensor.dim() or not tensor.numel():
            raise _checks.bad_value(name, argument, "non-empty of shape (..., C)", tensor)
    if input.shape[-1] != target.shape[-1]:
        accepted = f"of {input.shape[-1]} channels"
        raise _checks.bad_value(name, "target", accepted, target)
    dtype = computed(input, target)
    mine, theirs = (
        _moments(tensor.to(dtype).reshape(-1, tensor.shape[-1]))
        for tensor in (input, target.detach())
    )
    means, variances = ((a - b).abs() for a, b in zip(mine, theirs, strict=True))
    return (means + variances).mean()


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.mean(0)
    return mean, (rows - mean).square().mean(0)
