"""How heavy the tails of values are."""

from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.quant._arguments import computed

__all__ = ["kurtosis", "kurtosis_loss"]

PAPER = implements("KurTail: Kurtosis-based LLM Quantization", year=2025, arxiv="2503.01483")


@PAPER
def kurtosis(input: Tensor, *, dim: int | tuple[int, ...] = -1, eps: float = 0.0) -> Tensor:
    r"""The fourth central moment in units of the square of the second.

    .. math::

        \kappa = \frac{E[(x - \mu)^4]}{(E[(x - \mu)^2])^2 + \texttt{eps}}

    with means over ``dim``: 3 for normal values, 1.8 for uniform ones.

    Args:
        input: Values :math:`x`, of any shape.
        dim: The dimensions that are averaged over, and go.
        eps: At least 0; with 0, values that are all the same have nan.

    Returns:
        Of the other dimensions, float64 for float64 values and float32 otherwise.

    Raises:
        ValueError: ``dim`` is not of dimensions of ``input``, has one of them twice or one without
            entries, or ``eps`` is below 0.
        TypeError: ``input`` is not of a real floating dtype, ``dim`` not of ints, or ``eps`` no
            number.

    Example:
        >>> import torch
        >>> from tilework.quant import kurtosis
        >>> kurtosis(torch.tensor([[-1.0, 1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 4.0]]))
        tensor([1.0000, 2.3333])

    Reference:
        Mohammad Sadegh Akhondzadeh, Aleksandar Bojchevski, Evangelos Eleftheriou, Martino Dazzi.
        KurTail: Kurtosis-based LLM Quantization. 2025. arXiv:2503.01483.
    """
    name = "kurtosis"
    _checks.floating(name, "input", input)
    dims = dim if isinstance(dim, tuple) else (dim,)
    whole = [_checks.integer(name, "dim", one) for one in dims]
    count = input.dim()
    inside = all(-count <= one < count for one in whole)
    if not whole or not inside or len({one % count for one in whole}) < len(whole):
        raise _checks.bad_value(name, "dim", f"of different dimensions of {count}", dim)
    if not all(input.shape[one] for one in whole):
        raise _checks.bad_value(name, "input", f"with entries along dim={dim}", input)
    _checks.at_least(name, "eps", eps, 0)
    return _kurtosis(input, tuple(whole), eps)


def _kurtosis(input: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    values = input.to(computed(input))
    squares = (values - values.mean(dims, keepdim=True)).square()
    return squares.square().mean(dims) / (squares.mean(dims).square() + eps)


@PAPER
def kurtosis_loss(
    input: Tensor, *, target: float = 1.8, eps: float = 1e-8, reduction: str = "mean"
) -> Tensor:
    r"""The distance of the kurtosis of rows from that of values without tails.

    .. math::

        \lvert \kappa - \texttt{target} \rvert

    for each row along the last dimension, with :math:`\kappa` of :func:`kurtosis`.

    Args:
        input: Rows, of shape (..., n).
        target: The kurtosis that is wanted; 1.8 is that of uniform values.
        eps: As of :func:`kurtosis`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over rows.

    Returns:
        A scalar, or one for each row, float64 for float64 values and float32 otherwise; the mean of
        no rows is nan.

    Raises:
        ValueError: ``input`` has no entries in a row, ``eps`` is below 0, ``target`` is not finite,
            or ``reduction`` is not one of those above.
        TypeError: ``input`` is not of a real floating dtype, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import kurtosis_loss
        >>> kurtosis_loss(torch.tensor([[-1.0, 1.0, -1.0, 1.0]]))
        tensor(0.8000)

    Reference:
        As :func:`kurtosis`.
    """
    name = "kurtosis_loss"
    _checks.floating(name, "input", input)
    if not input.dim() or not input.shape[-1]:
        raise _checks.bad_value(name, "input", "of shape (..., n) with n of at least 1", input)
    _checks.finite(name, "target", target)
    _checks.at_least(name, "eps", eps, 0)
    _checks.one_of(name, "reduction", reduction, _checks.REDUCTIONS)
    losses = (_kurtosis(input, (-1,), eps) - target).abs()
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
