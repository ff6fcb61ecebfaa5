"""The layout of AWQ, as AutoAWQ, transformers and vLLM read it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.quant._arguments import check_granularity
from tilework.quant.layouts._words import (
    check_divides,
    check_quantized,
    check_tensors,
    codes_of,
    scales_in,
    words,
)
from tilework.quant.storage.quantized_tensor import QuantizedTensor

__all__ = ["from_awq", "to_awq"]

_PAPER = implements(
    "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    year=2023,
    arxiv="2306.00978",
)
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs is where in a word, the lowest bits first."""
BACK = tuple(sorted(range(8), key=ORDER.__getitem__))


def _ordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Eights along the last dimension in another order."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8)
    return eights[..., list(order)].reshape(codes.shape)


@_PAPER
@torch.no_grad()
def to_awq(
    quantized: QuantizedTensor, *, scale_dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    r"""Quantized weights as the tensors of a layer in the layout of AWQ, version GEMM.

    - ``qweight``, int32 of shape (in, out / 8): of eight consecutive outputs, those with the
      indices 0, 2, 4, 6, 1, 3, 5 and 7 from the lowest bits to the highest;
    - ``qzeros``, int32 of shape (groups, out / 8): the zero-points in that order;
    - ``scales``, of shape (groups, out).

    Args:
        quantized: Weights of 4 bits with groups along inputs, in order.
        scale_dtype: What scales are rounded to; readers expect float16.

    Returns:
        The tensors, by name.

    Raises:
        ValueError: ``quantized`` is not of 4 bits or has what the layout has no place for, as an
            ``input_scale``, which :func:`apply_scale_` folds; or its outputs do not fill words.
        TypeError: ``quantized`` is not a plain :class:`QuantizedTensor`, or ``scale_dtype`` not a
            floating dtype of at most 32 bits.

    Example:
        >>> import torch
        >>> from tilework.quant import from_awq, rtn_quantize, to_awq
        >>> quantized = rtn_quantize(torch.randn(16, 64), group_size=32)
        >>> tensors = to_awq(quantized, scale_dtype=torch.float32)
        >>> {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        {'qweight': (64, 2), 'qzeros': (2, 2), 'scales': (2, 16)}
        >>> torch.equal(from_awq(tensors, group_size=32).dequantize(), quantized.dequantize())
        True

    Reference:
        Ji Lin, Jiaming Tang, Haotian Tang, Shang Yang, Wei-Ming Chen, Wei-Chen Wang, Guangxuan
        Xiao, Xingyu Dang, Chuang Gan, Song Han. AWQ: Activation-aware Weight Quantization for LLM
        Compression and Acceleration. 2023. arXiv:2306.00978.
    """
    name = "to_awq"
    zero_point = check_quantized(name, quantized, (BITS,))
    scale = scales_in(name, quantized, scale_dtype)
    check_divides(name, quantized, outputs=quantized.shape[0])
    if quantized.group_index is not None:
        raise ValueError(f"{name}: quantized must have groups in order, without a group_index")
    return {
        "qweight": words(_ordered(quantized.codes.mT, ORDER), BITS),
        "qzeros": words(_ordered(zero_point.mT, ORDER), BITS),
        "scales": scale.mT.contiguous(),
    }


@_PAPER
@torch.no_grad()
def from_awq(
    tensors: Mapping[str, Tensor], *, group_size: int | None, dtype: torch.dtype | None = None
) -> QuantizedTensor:
    r"""Quantized weights of the tensors of a layer in the layout of AWQ, version GEMM.

    Args:
        tensors: ``qweight``, ``qzeros`` and ``scales``, as :func:`to_awq` gives them.
        group_size: Weights of a group; None is a whole row.
        dtype: What the weights dequantize to; None is that of ``scales``.

    Returns:
        The weights, with scales in float32.

    Raises:
        ValueError: A tensor is missing, too many or of a shape that does not fit the others.
        TypeError: A tensor is of another dtype.

    Example:
        As of :func:`to_awq`:

        >>> from tilework.quant import from_awq, to_awq

    Reference:
        As :func:`to_awq`.
    """
    name = "from_awq"
    check_granularity(name, group_size)
    check_tensors(name, tensors, qweight=torch.int32, qzeros=torch.int32, scales=None)
    qweight, qzeros, scales = (tensors[key] for key in ("qweight", "qzeros", "scales"))
    columns = len(qweight) if qweight.dim() else 0
    rows = scales.shape[-1] if scales.dim() else 0
    groups = -(-columns // (group_size or max(columns, 1)))
    _checks.shape(name, "scales", scales, (groups, rows))
    _checks.shape(name, "qweight", qweight, (columns, rows // 8))
    _checks.shape(name, "qzeros", qzeros, (groups, rows // 8))
    codes, zero_point = (_ordered(codes_of(one, BITS, rows), BACK).mT for one in (qweight, qzeros))
    return QuantizedTensor(
        codes.contiguous(),
        scales.mT.float().contiguous(),
        zero_point.float().contiguous(),
        bits=BITS,
        group_size=group_size,
        dtype=scales.dtype if dtype is None else dtype,
    )
