"""Codes of 1 to 8 bits one after another, without gaps."""

import math

import torch
from torch import Tensor

from tilework import _checks
from tilework.catalog import without_paper
from tilework.quant._arguments import check_bits, is_integer

__all__ = ["pack_codes", "unpack_codes"]

_REASON = "the stream of bits that codes are stored as"


def _unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and these bytes."""
    common = math.lcm(bits, 8)
    return common // bits, common // 8


@without_paper(_REASON)
def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes as a stream of bits along the last dimension.

    Code :math:`j` takes the bits :math:`j b, \\dots, j b + b - 1` of the stream, the least
    significant first, with :math:`b` = ``bits``; byte :math:`k` holds the bits :math:`8 k` to
    :math:`8 k + 7`, the least significant first. Zeros fill the last byte.

    Args:
        codes: Codes from 0 to ``2**bits - 1``, of an integer dtype, of shape (..., n).
        bits: Bits of a code, from 1 to 8.

    Returns:
        Bytes, uint8 of shape (..., ceil(n * bits / 8)).

    Raises:
        ValueError: ``bits`` is not from 1 to 8, ``codes`` has no dimension, or a code is out of
            range.
        TypeError: ``codes`` is not of an integer dtype, or ``bits`` not an int.

    Example:
        >>> import torch
        >>> from tilework.quant import pack_codes
        >>> pack_codes(torch.tensor([1, 2, 3]), bits=4)
        tensor([33,  3], dtype=torch.uint8)

    Reference:
        ``numpy.packbits`` with ``bitorder="little"``, of the bits of the codes.
    """
    name = "pack_codes"
    bits = check_bits(name, bits)
    if not isinstance(codes, Tensor) or not is_integer(codes):
        raise _checks.bad_type(name, "codes", "an integer tensor", codes)
    if not codes.dim():
        raise _checks.bad_value(name, "codes", "of at least one dimension", codes)
    if _checks.has_values(codes) and codes.numel():
        low, high = (int(end) for end in codes.aminmax())
        if low < 0 or high >= 2**bits:
            wrong = low if low < 0 else high
            raise ValueError(f"{name}: codes must be from 0 to {2**bits - 1}, got {wrong}")
    length = codes.shape[-1]
    count, size = _unit(bits)
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -length % count))
    units = codes.reshape(*codes.shape[:-1], codes.shape[-1] // count, count)
    packed = torch.zeros(*units.shape[:-1], size, dtype=torch.uint8, device=codes.device)
    for index in range(count):
        byte, shift = divmod(index * bits, 8)
        packed[..., byte] |= units[..., index] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= units[..., index] >> (8 - shift)
    return packed.flatten(-2)[..., : -(-length * bits // 8)].contiguous()


@without_paper(_REASON)
def unpack_codes(packed: Tensor, bits: int, length: int) -> Tensor:
    """The codes that :func:`pack_codes` has made a stream of.

    Args:
        packed: Bytes, uint8 of shape (..., ceil(length * bits / 8)).
        bits: Bits of a code, from 1 to 8.
        length: The number of codes, at least 0.

    Returns:
        Codes, uint8 of shape (..., length).

    Raises:
        ValueError: ``bits`` is not from 1 to 8, or ``packed`` does not hold ``length`` codes.
        TypeError: ``packed`` is not of uint8, or a number not an int.

    Example:
        >>> import torch
        >>> from tilework.quant import unpack_codes
        >>> unpack_codes(torch.tensor([33, 3], dtype=torch.uint8), bits=4, length=3)
        tensor([1, 2, 3], dtype=torch.uint8)

    Reference:
        ``numpy.packbits`` with ``bitorder="little"``, of the bits of the codes.
    """
    name = "unpack_codes"
    bits = check_bits(name, bits)
    _checks.count(name, "length", length, 0)
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        raise _checks.bad_type(name, "packed", "a tensor of uint8", packed)
    expected = -(-length * bits // 8)
    if not packed.dim() or packed.shape[-1] != expected:
        raise _checks.bad_value(
            name, "packed", f"of {expected} bytes in its last dimension", packed
        )
    count, size = _unit(bits)
    packed = torch.nn.functional.pad(packed, (0, -expected % size))
    units = packed.reshape(*packed.shape[:-1], packed.shape[-1] // size, size)
    codes = []
    for index in range(count):
        byte, shift = divmod(index * bits, 8)
        code = units[..., byte] >> shift
        if shift + bits > 8:
            code = code | units[..., byte + 1] << (8 - shift)
        codes.append(code & (2**bits - 1))
    return torch.stack(codes, -1).flatten(-2)[..., :length].contiguous()
