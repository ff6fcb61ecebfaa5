"""Codes in words of 32 bits, and what all layouts that are served need of quantized weights."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tilework import _checks
from tilework.quant.storage.pack_codes import pack_codes, unpack_codes
from tilework.quant.storage.quantized_tensor import QuantizedTensor

assert sys.byteorder == "little", "the layouts are those of little-endian machines"


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes along the last dimension as one stream of bits in int32, the lowest bit first."""
    packed = pack_codes(codes, bits)
    missing = -packed.shape[-1] % 4
    padded = torch.nn.functional.pad(packed, (0, missing))
    return padded.reshape(-1).view(torch.int32).reshape(*codes.shape[:-1], -1)


def codes_of(stream: Tensor, bits: int, length: int) -> Tensor:
    """The codes in words, uint8."""
    packed = stream.contiguous().view(torch.uint8)
    return unpack_codes(packed[..., : -(-length * bits // 8)].contiguous(), bits, length)


def check_quantized(name: str, quantized: Any, bits: tuple[int, ...]) -> Tensor:
    """Refuse what the layouts have no place for; the zero-points, as uint8."""
    if type(quantized) is not QuantizedTensor:
        raise _checks.bad_type(name, "quantized", "a QuantizedTensor", quantized)
    if quantized.bits not in bits:
        accepted = "of " + " or ".join(map(str, bits)) + " bits"
        raise _checks.bad_value(name, "quantized", accepted, quantized.bits)
    if quantized.axis != "out":
        raise _checks.bad_value(name, "quantized", "of axis='out'", quantized.axis)
    for field, advice in (
        ("input_scale", "; apply_scale_ folds it into the layer before"),
        ("transform", ""),
    ):
        if getattr(quantized, field) is not None:
            raise ValueError(f"{name}: quantized must have no {field}{advice}")
    columns = quantized.shape[1]
    size = quantized.group_size
    if size is not None and columns % size:
        accepted = f"of groups that divide its {columns} columns"
        raise _checks.bad_value(name, "quantized", accepted, size)
    zero_point = quantized.zero_point
    most = 2**quantized.bits - 1
    if not ((zero_point == zero_point.round()) & (zero_point >= 0) & (zero_point <= most)).all():
        raise ValueError(
            f"{name}: quantized must have zero-points that are integers from 0 to {most}, "
            "as of the schemes 'asymmetric', 'symmetric' and 'restricted'"
        )
    return zero_point.to(torch.uint8)


def check_divides(name: str, quantized: QuantizedTensor, **sizes: int) -> None:
    """Refuse sizes whose codes do not fill words."""
    for side, size in sizes.items():
        if size * quantized.bits % 32:
            raise ValueError(
                f"{name}: quantized must have a number of {side} whose {quantized.bits} bits fill "
                f"words of 32, got {size}"
            )


def check_tensors(name: str, tensors: Mapping[str, Tensor], **expected: torch.dtype | None) -> None:
    """Refuse tensors of other names or dtypes; None is any floating one."""
    if tensors.keys() != expected.keys():
        raise ValueError(
            f"{name}: tensors must be {', '.join(expected)}, got {', '.join(tensors) or 'none'}"
        )
    for key, dtype in expected.items():
        tensor = tensors[key]
        fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if not fits:
            accepted = "floating" if dtype is None else str(dtype).removeprefix("torch.")
            raise _checks.bad_type(name, key, f"of a dtype {accepted}", tensor)


def in_groups(index: Tensor | None, columns: int, group_size: int | None) -> Tensor:
    """The group of each column."""
    if index is not None:
        return index
    return torch.arange(columns) // (group_size or columns)


def scales_in(name: str, quantized: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype of a file, of shape (out, groups); refuse what it does not hold."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        accepted = "torch.float16, torch.bfloat16 or torch.float32"
        raise _checks.bad_type(name, "scale_dtype", accepted, dtype)
    scale = quantized.scale.to(dtype)
    if not (scale.isfinite() & (scale != 0)).all():
        raise ValueError(f"{name}: scale_dtype must hold all scales, but {dtype} does not")
    return scale
