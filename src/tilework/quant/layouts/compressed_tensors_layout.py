"""The layout "pack-quantized" of compressed-tensors, as vLLM and transformers read it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tilework import _checks
from tilework.catalog import without_paper
from tilework.quant._arguments import check_bits, check_granularity
from tilework.quant.layouts._words import (
    check_quantized,
    check_tensors,
    codes_of,
    scales_in,
    words,
)
from tilework.quant.storage.quantized_tensor import QuantizedTensor

__all__ = ["from_compressed_tensors", "to_compressed_tensors"]

BITS = tuple(range(1, 9))
_REASON = "a layout that quantized models are served in"


@without_paper(_REASON)
@torch.no_grad()
def to_compressed_tensors(
    quantized: QuantizedTensor,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    symmetric: bool | None = None,
) -> dict[str, Tensor]:
    r"""Quantized weights as the tensors of a layer in the layout "pack-quantized".

    - ``weight_packed``, int32 of shape (out, ceil(in · bits / 32)): the codes of each output as one
      stream of bits, the lowest bit first;
    - ``weight_scale``, of shape (out, groups);
    - ``weight_zero_point``, int32 of shape (ceil(out · bits / 32), groups): the zero-points as such
      a stream along the outputs, if ``symmetric`` is False or, for None, one is not
      :math:`2^{b - 1}`;
    - ``weight_g_idx``, int32 of shape (in,), if groups are not in order, which new versions of the
      package do not read;
    - ``weight_shape``, int64: (out, in).

    Args:
        quantized: Weights with groups along inputs.
        scale_dtype: What scales are rounded to: the dtype of the model.
        symmetric: Whether zero-points are left out, as the configuration of a model says for all of
            its layers; None is if they can be.

    Returns:
        The tensors, by name.

    Raises:
        ValueError: ``quantized`` has what the layout has no place for, or zero-points that
            ``symmetric`` denies.
        TypeError: ``quantized`` is not a plain :class:`QuantizedTensor`, or ``scale_dtype`` not a
            floating dtype of at most 32 bits.

    Example:
        >>> import torch
        >>> from tilework.quant import from_compressed_tensors, rtn_quantize
        >>> from tilework.quant import to_compressed_tensors
        >>> quantized = rtn_quantize(torch.randn(6, 64), group_size=32, scheme="symmetric")
        >>> tensors = to_compressed_tensors(quantized, scale_dtype=torch.float32)
        >>> {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        {'weight_packed': (6, 8), 'weight_scale': (6, 2), 'weight_shape': (2,)}
        >>> again = from_compressed_tensors(tensors, bits=4, group_size=32)
        >>> torch.equal(again.dequantize(), quantized.dequantize())
        True

    Reference:
        The vLLM project. compressed-tensors. 2024.
    """
    name = "to_compressed_tensors"
    zero_point = check_quantized(name, quantized, BITS)
    scale = scales_in(name, quantized, scale_dtype)
    bits = quantized.bits
    tensors = {
        "weight_packed": words(quantized.codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(quantized.shape),
    }
    in_middle = bool((zero_point == 2 ** (bits - 1)).all())
    if symmetric and not in_middle:
        raise ValueError(f"{name}: symmetric must not be True with zero-points that differ")
    if not (in_middle if symmetric is None else symmetric):
        tensors["weight_zero_point"] = words(zero_point.mT, bits).mT.contiguous()
    if quantized.group_index is not None:
        tensors["weight_g_idx"] = quantized.group_index.to(torch.int32)
    return tensors


@without_paper(_REASON)
@torch.no_grad()
def from_compressed_tensors(
    tensors: Mapping[str, Tensor],
    *,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype | None = None,
) -> QuantizedTensor:
    r"""Quantized weights of the tensors of a layer in the layout "pack-quantized".

    Args:
        tensors: As :func:`to_compressed_tensors` gives them.
        bits: Bits of a code, from 1 to 8.
        group_size: Weights of a group; None is a whole row, the strategy "channel".
        dtype: What the weights dequantize to; None is that of ``weight_scale``.

    Returns:
        The weights, with scales in float32.

    Raises:
        ValueError: A tensor is missing, too many or of a shape that does not fit the others, or
            ``bits`` is out of range.
        TypeError: A tensor is of another dtype.

    Example:
        As of :func:`to_compressed_tensors`:

        >>> from tilework.quant import from_compressed_tensors, to_compressed_tensors

    Reference:
        As :func:`to_compressed_tensors`.
    """
    name = "from_compressed_tensors"
    check_bits(name, bits)
    check_granularity(name, group_size)
    expected: dict[str, torch.dtype | None] = {
        "weight_packed": torch.int32,
        "weight_scale": None,
        "weight_shape": torch.int64,
    }
    for key in ("weight_zero_point", "weight_g_idx"):
        if key in tensors:
            expected[key] = torch.int32
    check_tensors(name, tensors, **expected)
    _checks.shape(name, "weight_shape", tensors["weight_shape"], (2,))
    rows, columns = tensors["weight_shape"].tolist()
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    groups = -(-columns // (group_size or max(columns, 1)))
    _checks.shape(name, "weight_packed", packed, (rows, -(-columns * bits // 32)))
    _checks.shape(name, "weight_scale", scale, (rows, groups))
    zero_point = torch.full((rows, groups), 2.0 ** (bits - 1), device=scale.device)
    if "weight_zero_point" in tensors:
        stream = tensors["weight_zero_point"]
        _checks.shape(name, "weight_zero_point", stream, (-(-rows * bits // 32), groups))
        zero_point = codes_of(stream.mT, bits, rows).mT.float().contiguous()
    index = tensors.get("weight_g_idx")
    if index is not None:
        _checks.shape(name, "weight_g_idx", index, (columns,))
    return QuantizedTensor(
        codes_of(packed, bits, columns),
        scale.float(),
        zero_point,
        bits=bits,
        group_size=group_size,
        group_index=None if index is None else index.long(),
        dtype=scale.dtype if dtype is None else dtype,
    )
