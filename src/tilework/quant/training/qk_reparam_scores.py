"""Scores of attention from one matrix for each head, which is quantized as a whole."""

from collections.abc import Callable

from torch import Tensor

from tilework import _checks
from tilework.quant.training.statsq_quantize import PAPER

__all__ = ["qk_reparam_scores"]


@PAPER
def qk_reparam_scores(
    input: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
    quantizer: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""Scores of self-attention by the product of the weights of queries and keys.

    With the rows :math:`W_q^{(h)}, W_k^{(h)}` of head :math:`h`, :math:`E` of each:

    .. math::

        W^{(h)} = W_q^{(h) \top} W_k^{(h)}, \qquad
        S^{(h)} = \texttt{scale} \cdot x \, W^{(h)} x^\top

    so that a ``quantizer`` rounds the product, and not two factors whose oscillations meet. There
    are no biases.

    Args:
        input: Tokens :math:`x`, of shape (B, L, I).
        query_weight: Weights of the queries, of shape (H * E, I).
        key_weight: Weights of the keys, of the same shape.
        num_heads: The number of heads H.
        scale: Factor of the scores, by default :math:`E^{-1/2}`.
        quantizer: Takes the products of all heads, of shape (H * I, I), and returns values of that
            shape, as a :class:`StatsQuantizer` does; None takes them as they are.

    Returns:
        Scores of shape (B, H, L, L).

    Raises:
        ValueError: A shape is not one of those above, ``num_heads`` does not divide the rows, or
            ``scale`` is not finite.
        TypeError: A tensor is not of a real floating dtype, or an option of another type.

    Example:
        >>> import torch
        >>> from tilework.quant import StatsQuantizer, qk_reparam_scores
        >>> x, query, key = torch.randn(2, 5, 8), torch.randn(8, 8), torch.randn(8, 8)
        >>> qk_reparam_scores(x, query, key, num_heads=2, quantizer=StatsQuantizer(3)).shape
        torch.Size([2, 2, 5, 5])

    Reference:
        As :func:`statsq_quantize`.
    """
    name = "qk_reparam_scores"
    for argument, tensor, dims in (
        ("input", input, 3),
        ("query_weight", query_weight, 2),
        ("key_weight", key_weight, 2),
    ):
        _checks.floating(name, argument, tensor)
        if tensor.dim() != dims:
            raise _checks.bad_value(name, argument, f"of {dims} dimensions", tensor)
    _checks.count(name, "num_heads", num_heads)
    rows, columns = query_weight.shape
    if not rows or rows % num_heads:
        accepted = f"of a multiple of num_heads={num_heads} rows"
        raise _checks.bad_value(name, "query_weight", accepted, query_weight)
    _checks.shape(name, "key_weight", key_weight, query_weight.shape)
    if input.shape[-1] != columns:
        raise _checks.bad_value(name, "input", f"of {columns} features", input)
    if scale is None:
        scale = (rows // num_heads) ** -0.5
    else:
        _checks.finite(name, "scale", scale)
    if quantizer is not None and not callable(quantizer):
        raise _checks.bad_type(name, "quantizer", "None or callable", quantizer)
    query, key = (weight.reshape(num_heads, -1, columns) for weight in (query_weight, key_weight))
    product = query.mT @ key
    if quantizer is not None:
        quantized = quantizer(product.flatten(0, 1))
        _checks.shape(name, "the result of quantizer", quantized, (num_heads * columns, columns))
        product = quantized.reshape(num_heads, columns, columns)
    tokens = input.unsqueeze(1)
    scores: Tensor = (tokens @ product * _checks.plain(scale)) @ tokens.mT
    return scores
