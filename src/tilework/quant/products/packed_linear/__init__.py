"""The product of inputs and weights that stay codes in memory."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tilework import _checks, _implementations
from tilework._implementations import TABLES, Implementation
from tilework._operators import is_autocast
from tilework.catalog import without_paper
from tilework.quant._arguments import check_bits, check_granularity
from tilework.quant._groups import grid_shape
from tilework.quant.products.packed_linear import operators
from tilework.quant.products.packed_linear.common import Product

__all__ = ["packed_linear"]

_BITS = (1, 2, 4, 8)
# By themselves: a look here makes a constant of a number that torch.compile keeps open.
_CONSTANTS = tuple(range(9))


def _refusal(_: Tensor, bits: int) -> str | None:
    return None if bits in _BITS else f"it takes codes of 1, 2, 4 or 8 bits, not of {bits}"


IMPLEMENTATIONS = (
    Implementation.triton(
        "for few rows an output in float32 for each part of the inputs",
        refuses=_refusal,
        when="codes of 1, 2, 4 or 8 bits",
    ),
    Implementation("tiled", "4 MiB of weights several times, and the input in the sums' dtype"),
    Implementation.reference("all weights in the sums' dtype several times"),
)
TABLES["quant.packed_linear"] = IMPLEMENTATIONS


@without_paper("the product of layers whose weights are codes")
def packed_linear(
    input: Float[Tensor, "*batch in"],
    packed: UInt8[Tensor, "out bytes"],
    scale: Float[Tensor, "out groups"],
    zero_point: Float[Tensor, "out groups"],
    bias: Float[Tensor, " out"] | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    implementation: str | None = None,
) -> Float[Tensor, "*batch out"]:
    r"""A linear layer whose weights are made of codes inside of the product.

    .. math::

        y_o = \sum_j x_j \, s_{o g(j)} (q_{oj} - z_{o g(j)}) + b_o, \qquad
        g(j) = \lfloor j / \texttt{group\_size} \rfloor

    with ``input`` :math:`x`, the codes :math:`q` that are ``packed``, ``scale`` :math:`s`,
    ``zero_point`` :math:`z` and ``bias`` :math:`b`. It is ``F.linear`` with the weights of a
    :class:`QuantizedTensor`, which never exist all at once, but with ``"reference"``. Sums are
    computed in float32 (float64 for float64), the output is rounded once; autocast casts ``input``
    and ``bias`` as it does for ``F.linear``. Gradients are those of ``input`` and ``bias``.

    Args:
        input: Inputs, of shape (..., in).
        packed: Codes as of :func:`pack_codes`, uint8 of shape (out, ceil(in * bits / 8)).
        scale: Scales of the groups, of shape (out, ceil(in / group_size)); a constant.
        zero_point: Zero-points, as ``scale``.
        bias: A bias of shape (out,), of the dtype of ``input``, or None.
        bits: Bits of a code, from 1 to 8.
        group_size: Weights of a group; None is a whole row.
        implementation: ``"triton"`` (CUDA; codes of 1, 2, 4 or 8 bits; weights are rounded to the
            dtype of ``input`` before they are multiplied), ``"tiled"`` (the weights of some outputs
            at a time) or ``"reference"`` (all weights). None picks the first of these that takes
            the arguments.

    Returns:
        Outputs of shape (..., out), of the dtype of ``input``.

    Raises:
        ValueError: A shape, an option or an implementation is not one of those above, or ``scale``
            or ``zero_point`` requires a gradient.
        TypeError: A tensor is not of one of the dtypes above, or a number not an int.

    Example:
        >>> import torch
        >>> from tilework.quant import packed_linear, rtn_quantize
        >>> quantized = rtn_quantize(torch.tensor([[-1.0, 0.4, 2.0]]), bits=2)
        >>> grids = quantized.scale, quantized.zero_point
        >>> packed_linear(torch.tensor([[1.0, 5.0, 1.0]]), quantized.packed(), *grids, bits=2)
        tensor([[1.]])

    Reference:
        Benoit Jacob, Skirmantas Kligys, Bo Chen, and others. Quantization and Training of Neural
        Networks for Efficient Integer-Arithmetic-Only Inference. 2017. arXiv:1712.05877.
    """
    name = "packed_linear"
    _checks.floating(name, "input", input)
    if not input.dim():
        raise _checks.bad_value(name, "input", "of at least one dimension", input)
    bits = _CONSTANTS[check_bits(name, bits)]
    check_granularity(name, group_size)
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        raise _checks.bad_type(name, "packed", "a tensor of uint8", packed)
    columns = input.shape[-1]
    num_bytes = (columns * bits + 7) // 8
    if packed.dim() != 2 or packed.shape[1] != num_bytes:
        accepted = f"of shape (out, {num_bytes}) for input's {columns} features"
        raise _checks.bad_value(name, "packed", accepted, packed)
    outputs = packed.shape[0]
    for argument, grid in (("scale", scale), ("zero_point", zero_point)):
        _checks.constant(name, argument, grid, grid_shape((outputs, columns), group_size, "out"))
    input, bias = _cast(input), None if bias is None else _cast(bias)
    if bias is not None:
        if bias.dtype != input.dtype:
            raise _checks.bad_type(name, "bias", f"of input's {input.dtype}", bias)
        _checks.shape(name, "bias", bias, (outputs,))
    _checks.same_device(
        name, input=input, packed=packed, scale=scale, zero_point=zero_point, bias=bias
    )
    chosen = _implementations.choose(name, IMPLEMENTATIONS, implementation, input, bits=bits)
    given = Product(
        (input if input.dim() > 1 else input[None]).flatten(0, -2),
        packed,
        scale,
        zero_point,
        bias,
        columns,
        bits,
        group_size,
        chosen,
    )
    output: Tensor = operators.packed_linear(given).output
    return output.reshape(*input.shape[:-1], outputs)


def _cast(tensor: Tensor) -> Tensor:
    """As autocast casts what it multiplies."""
    device = tensor.device.type
    if not is_autocast(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
