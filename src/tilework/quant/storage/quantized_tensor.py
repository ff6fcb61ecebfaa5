"""Weights as codes, with the grids that these are levels of."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from tilework import _checks
from tilework.catalog import without_paper
from tilework.quant._arguments import check_bits, check_codes, check_granularity, check_grid
from tilework.quant._groups import spread
from tilework.quant.storage._stored import StoredWeights, Transform
from tilework.quant.storage.pack_codes import pack_codes, unpack_codes

__all__ = ["QuantizedTensor"]


@without_paper("what rounding algorithms return and layers store")
@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor(StoredWeights):
    r"""Quantized weights: codes and the grids that they are levels of.

    The entry in row :math:`o` and column :math:`j` of the weights is

    .. math::

        \hat W_{oj} = s_{o g(j)} (q_{oj} - z_{o g(j)}) / t_j

    with ``codes`` :math:`q`, ``scale`` :math:`s`, ``zero_point`` :math:`z`, ``input_scale``
    :math:`t`, and the group :math:`g(j)` that ``group_index`` says, or else
    :math:`\lfloor j / \texttt{group\_size} \rfloor`; with ``axis="in"`` groups are of rows. Then
    ``transform.inverse`` is taken of it.

    It does not change; ``to(device)`` gives a copy on a device.

    Args:
        codes: Codes, uint8 of shape (out, in).
        scale: Scales, of the shape that :func:`fit_grid` gives.
        zero_point: Zero-points, as ``scale``.
        bits: Bits of a code, from 1 to 8.
        group_size: Weights of a group; None is a whole row or column.
        axis: ``"out"``, ``"in"`` or ``"tensor"``, as of :func:`fit_grid`.
        group_index: The group of each column, int64 of shape (in,); with ``axis="out"`` only.
        input_scale: What columns were multiplied by before they were quantized, of shape (in,).
        transform: What was done to the weights before, with a method ``inverse``.
        dtype: What :meth:`dequantize` returns, by default float32.

    Raises:
        ValueError: A tensor does not fit the others, or an option is not one of those above.
        TypeError: A tensor is not of the dtype that it must have, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import QuantizedTensor
        >>> codes = torch.tensor([[0, 1, 3]], dtype=torch.uint8)
        >>> one = torch.ones(1, 1)
        >>> quantized = QuantizedTensor(codes, 0.5 * one, one, bits=2)
        >>> quantized.dequantize()
        tensor([[-0.5000,  0.0000,  1.0000]])
        >>> quantized.packed()
        tensor([[52]], dtype=torch.uint8)

    Reference:
        Benoit Jacob, Skirmantas Kligys, Bo Chen, and others. Quantization and Training of Neural
        Networks for Efficient Integer-Arithmetic-Only Inference. 2017. arXiv:1712.05877.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    _: KW_ONLY
    bits: int
    group_size: int | None = None
    axis: str = "out"
    group_index: Tensor | None = None
    input_scale: Tensor | None = None
    transform: Transform | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_bits(name, self.bits)
        check_granularity(name, self.group_size, self.axis)
        check_codes(name, self.codes)
        if self.codes.dtype != torch.uint8:
            raise _checks.bad_type(name, "codes", "a tensor of uint8", self.codes)
        check_grid(name, self.scale, self.zero_point, tuple(self.shape), self.group_size, self.axis)
        columns = self.shape[1]
        if self.group_index is not None:
            self._check_group_index(name, self.group_index)
        if self.input_scale is not None:
            _checks.floating(name, "input_scale", self.input_scale)
            _checks.shape(name, "input_scale", self.input_scale, (columns,))
        if self.dtype is None:
            object.__setattr__(self, "dtype", torch.float32)
        elif not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise _checks.bad_type(name, "dtype", "a floating dtype", self.dtype)
        _checks.same_device(name, **self.tensors())

    def _check_group_index(self, name: str, index: Tensor) -> None:
        if self.axis != "out":
            raise ValueError(f"{name}: group_index must be None with axis={self.axis!r}")
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise _checks.bad_type(name, "group_index", "a tensor of int64", index)
        _checks.shape(name, "group_index", index, (self.shape[1],))
        groups = self.scale.shape[1]
        if _checks.has_values(index) and not ((index >= 0) & (index < groups)).all():
            raise ValueError(f"{name}: group_index must be from 0 to {groups - 1}")

    @property
    def shape(self) -> torch.Size:
        """Of the weights: (out, in)."""
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights that the codes stand for.

        Args:
            dtype: In the place of the one that the weights had before.

        Returns:
            Weights of shape (out, in).
        """
        weight = self._values()
        if self.input_scale is not None:
            weight = weight / self.input_scale
        if self.transform is not None:
            weight = self.transform.inverse(weight)
        return weight.to(dtype or self.dtype)

    def _values(self) -> Tensor:
        """Those of the codes alone."""
        grids = self.scale, self.zero_point
        if self.group_index is None:
            shape = tuple(self.shape)
            scale, zero_point = (spread(g, shape, self.group_size, self.axis) for g in grids)
        else:
            scale, zero_point = (grid[:, self.group_index] for grid in grids)
        return scale * (self.codes.to(scale.dtype) - zero_point)

    def packed(self) -> Tensor:
        """The codes without gaps, as of :func:`pack_codes`.

        Returns:
            Bytes, uint8 of shape (out, ceil(in * bits / 8)).
        """
        return pack_codes(self.codes, self.bits)

    @classmethod
    def from_packed(
        cls,
        packed: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        *,
        bits: int,
        shape: tuple[int, int] | torch.Size,
        **options: Any,
    ) -> "QuantizedTensor":
        """The quantized weights of what :meth:`packed` gave.

        Args:
            packed: Bytes, uint8 of shape (out, ceil(in * bits / 8)).
            scale: Scales, as of the constructor.
            zero_point: Zero-points, as of the constructor.
            bits: Bits of a code, from 1 to 8.
            shape: Of the weights: (out, in).
            **options: The other options of the constructor.

        Returns:
            The quantized weights.
        """
        codes = unpack_codes(packed, bits, shape[1])
        _checks.shape("QuantizedTensor", "packed", packed, (shape[0], packed.shape[-1]))
        return cls(codes, scale, zero_point, bits=bits, **options)

    def __repr__(self) -> str:
        """In one line, without values."""
        groups = "a row" if self.group_size is None else f"groups of {self.group_size}"
        return (
            f"{type(self).__name__}({tuple(self.shape)}, {self.bits} bits, axis={self.axis!r}, "
            f"{groups}, {self.dtype})"
        )
