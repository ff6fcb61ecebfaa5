"""The layout of GPTQ, as AutoGPTQ, GPTQModel, transformers and vLLM read it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.quant._arguments import check_bits, check_granularity
from tilework.quant.layouts._words import (
    check_divides,
    check_quantized,
    check_tensors,
    codes_of,
    in_groups,
    scales_in,
    words,
)
from tilework.quant.storage.quantized_tensor import QuantizedTensor

__all__ = ["from_gptq", "to_gptq"]

_PAPER = implements(
    "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    year=2022,
    arxiv="2210.17323",
)
BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")


@_PAPER
@torch.no_grad()
def to_gptq(
    quantized: QuantizedTensor,
    *,
    checkpoint_format: str = "gptq",
    scale_dtype: torch.dtype = torch.float16,
) -> dict[str, Tensor]:
    r"""Quantized weights as the tensors of a layer in the layout of GPTQ.

    - ``qweight``, int32 of shape (in · bits / 32, out): the codes of each output as one stream of
      bits along the inputs, the lowest bit first;
    - ``qzeros``, int32 of shape (groups, out · bits / 32): the zero-points, less 1 for the format
      ``"gptq"``, as such a stream along the outputs;
    - ``scales``, of shape (groups, out);
    - ``g_idx``, int32 of shape (in,): the group of each input.

    Args:
        quantized: Weights of 2, 3, 4 or 8 bits with groups along inputs.
        checkpoint_format: ``"gptq"``, which all readers know and has no zero-point 0, or
            ``"gptq_v2"``.
        scale_dtype: What scales are rounded to; readers expect float16 or bfloat16.

    Returns:
        The tensors, by name.

    Raises:
        ValueError: ``quantized`` is not of those bits or has what the layout has no place for, a
            size does not fill words, or ``checkpoint_format`` is not one of those above.
        TypeError: ``quantized`` is not a plain :class:`QuantizedTensor`, or ``scale_dtype`` not a
            floating dtype of at most 32 bits.

    Example:
        >>> import torch
        >>> from tilework.quant import from_gptq, rtn_quantize, to_gptq
        >>> quantized = rtn_quantize(torch.randn(32, 64), group_size=32)
        >>> tensors = to_gptq(quantized, checkpoint_format="gptq_v2", scale_dtype=torch.float32)
        >>> {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        {'qweight': (8, 32), 'qzeros': (2, 4), 'scales': (2, 32), 'g_idx': (64,)}
        >>> again = from_gptq(tensors, bits=4, group_size=32, checkpoint_format="gptq_v2")
        >>> torch.equal(again.dequantize(), quantized.dequantize())
        True

    Reference:
        Elias Frantar, Saleh Ashkboos, Torsten Hoefler, Dan Alistarh. GPTQ: Accurate Post-Training
        Quantization for Generative Pre-trained Transformers. 2022. arXiv:2210.17323.
    """
    name = "to_gptq"
    zero_point = check_quantized(name, quantized, BITS)
    _checks.one_of(name, "checkpoint_format", checkpoint_format, FORMATS)
    scale = scales_in(name, quantized, scale_dtype)
    rows, columns = quantized.shape
    check_divides(name, quantized, outputs=rows, inputs=columns)
    if checkpoint_format == "gptq":
        if (zero_point == 0).any():
            raise ValueError(
                f"{name}: quantized must have zero-points of at least 1 for the format 'gptq', "
                "which keeps them less 1; 'gptq_v2' keeps them as they are"
            )
        zero_point = zero_point - 1
    bits = quantized.bits
    groups = in_groups(quantized.group_index, columns, quantized.group_size)
    return {
        "qweight": words(quantized.codes, bits).mT.contiguous(),
        "qzeros": words(zero_point.mT, bits),
        "scales": scale.mT.contiguous(),
        "g_idx": groups.to(quantized.device, torch.int32),
    }


@_PAPER
@torch.no_grad()
def from_gptq(
    tensors: Mapping[str, Tensor],
    *,
    bits: int,
    group_size: int | None,
    checkpoint_format: str = "gptq",
    dtype: torch.dtype | None = None,
) -> QuantizedTensor:
    r"""Quantized weights of the tensors of a layer in the layout of GPTQ.

    Args:
        tensors: ``qweight``, ``qzeros``, ``scales`` and ``g_idx``, as :func:`to_gptq` gives them.
        bits: Bits of a code: 2, 3, 4 or 8.
        group_size: Weights of a group; None is a whole row, which configurations call -1.
        checkpoint_format: ``"gptq"`` or ``"gptq_v2"``.
        dtype: What the weights dequantize to; None is that of ``scales``.

    Returns:
        The weights, with scales in float32.

    Raises:
        ValueError: A tensor is missing, too many or of a shape that does not fit the others, or an
            option is not one of those above.
        TypeError: A tensor is of another dtype.

    Example:
        As of :func:`to_gptq`:

        >>> from tilework.quant import from_gptq, to_gptq

    Reference:
        As :func:`to_gptq`.
    """
    name = "from_gptq"
    check_bits(name, bits)
    _checks.one_of(name, "bits", bits, BITS)
    check_granularity(name, group_size)
    _checks.one_of(name, "checkpoint_format", checkpoint_format, FORMATS)
    check_tensors(
        name, tensors, qweight=torch.int32, qzeros=torch.int32, scales=None, g_idx=torch.int32
    )
    qweight, qzeros, scales, index = (
        tensors[key] for key in ("qweight", "qzeros", "scales", "g_idx")
    )
    _checks.shape(name, "g_idx", index, (index.numel(),))
    columns = len(index)
    groups = -(-columns // (group_size or columns))
    rows = scales.shape[-1] if scales.dim() else 0
    _checks.shape(name, "scales", scales, (groups, rows))
    _checks.shape(name, "qweight", qweight, (columns * bits // 32, rows))
    _checks.shape(name, "qzeros", qzeros, (groups, rows * bits // 32))
    zero_point = codes_of(qzeros, bits, rows).mT.float()
    if checkpoint_format == "gptq":
        zero_point = zero_point + 1
        if (zero_point == 2**bits).any():
            raise ValueError(
                f"{name}: qzeros must not hold {2**bits - 1} in the format 'gptq', which some take "
                f"for the zero-point 0 and others for {2**bits}"
            )
    index = index.long()
    in_order = torch.equal(index, in_groups(None, columns, group_size).to(index.device))
    return QuantizedTensor(
        codes_of(qweight.mT, bits, columns),
        scales.mT.float().contiguous(),
        zero_point.contiguous(),
        bits=bits,
        group_size=group_size,
        group_index=None if in_order else index,
        dtype=scales.dtype if dtype is None else dtype,
    )
