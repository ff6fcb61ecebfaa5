"""The stream of bits, against NumPy's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilework.quant import pack_codes, unpack_codes


def stream(codes: torch.Tensor, bits: int) -> np.ndarray:
    expanded = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    flat = expanded.reshape(*codes.shape[:-1], -1).astype(np.uint8)
    return np.packbits(flat, axis=-1, bitorder="little")


@given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 2**32))
def test_packing_and_back(bits: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (3, 2, length), generator=generator)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    np.testing.assert_array_equal(packed.numpy(), stream(codes, bits))
    unpacked = unpack_codes(packed, bits, length)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked.long(), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_all_integers(dtype: torch.dtype) -> None:
    codes = torch.tensor([1, 0, 5, 7, 2], dtype=dtype)
    assert pack_codes(codes, 3).tolist() == stream(codes.long(), 3).tolist()


def test_strides_do_not_matter() -> None:
    codes = torch.randint(0, 8, (5, 9)).T
    packed = pack_codes(codes, 3)
    assert torch.equal(unpack_codes(packed.T.contiguous().T, 3, 5).long(), codes)


@pytest.mark.untyped
def test_bad_input() -> None:
    codes = torch.tensor([0, 1])
    for bad, error, message in (
        (torch.tensor([0, 4]), ValueError, "codes must be from 0 to 3, got 4"),
        (torch.tensor([-1, 0]), ValueError, "codes must be from 0 to 3, got -1"),
        (torch.tensor(1), ValueError, "codes must be of at least one dimension"),
        (torch.tensor([0.0]), TypeError, "codes must be an integer tensor"),
        (torch.tensor([True]), TypeError, "codes must be an integer tensor"),
    ):
        with pytest.raises(error, match=rf"^pack_codes: {message}"):
            pack_codes(bad, 2)
    packed = pack_codes(codes, 2)
    for bits, error in ((0, ValueError), (9, ValueError), (True, TypeError), (2.0, TypeError)):
        with pytest.raises(error, match=r"^pack_codes: bits must be"):
            pack_codes(codes, bits)
        with pytest.raises(error, match=r"^unpack_codes: bits must be"):
            unpack_codes(packed, bits, 2)
    with pytest.raises(ValueError, match=r"^unpack_codes: packed must be of 2 bytes"):
        unpack_codes(packed, 2, 5)
    with pytest.raises(ValueError, match=r"^unpack_codes: length must be"):
        unpack_codes(packed, 2, -1)
    with pytest.raises(TypeError, match=r"^unpack_codes: packed must be a tensor of uint8"):
        unpack_codes(packed.int(), 2, 2)
