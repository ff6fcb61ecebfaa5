"""Weights as indices of vectors in codebooks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements
from tilework.quant.storage._stored import StoredWeights

__all__ = ["VectorQuantizedTensor"]


@implements(
    "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models",
    year=2024,
    arxiv="2409.17066",
)
@dataclass(frozen=True, eq=False, repr=False)
class VectorQuantizedTensor(StoredWeights):
    r"""Weights whose columns are cut into vectors of consecutive rows, each one of a codebook.

    The :math:`v` rows from :math:`k v` of column :math:`j` are

    .. math::

        t_j \left( c_{i_{kj}} + c'_{i'_{kj}} \right) + b_j

    with ``indices`` :math:`i` into ``centroids`` :math:`c`, the same of the residuals, and
    ``column_scale`` :math:`t` and ``column_bias`` :math:`b`, each where it is given. Of the last
    vector, rows beyond the weights are dropped.

    Args:
        indices: int64 of shape (ceil(out / v), in).
        centroids: Of shape (K, v).
        residual_indices: As ``indices``, or None.
        residual_centroids: Of shape (K', v), or None.
        column_scale: Of shape (in,), or None.
        column_bias: Of shape (in,), or None.
        shape: Of the weights: (out, in).
        dtype: What :meth:`dequantize` returns, by default float32.

    Raises:
        ValueError: A tensor does not fit the others, or an index is out of its codebook.
        TypeError: A tensor is not of the dtype that it must have.

    Example:
        >>> import torch
        >>> from tilework.quant import VectorQuantizedTensor
        >>> book = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
        >>> indices = torch.tensor([[0, 1], [1, 1]])
        >>> quantized = VectorQuantizedTensor(indices, book, shape=torch.Size((3, 2)))
        >>> quantized.dequantize()
        tensor([[0., 1.],
                [0., 2.],
                [1., 1.]])
        >>> quantized.bits_per_weight
        0.5

    Reference:
        Yifei Liu, Jicheng Wen, Yang Wang, Shengyu Ye, Li Lyna Zhang, Ting Cao, Cheng Li, Mao Yang.
        VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models. 2024.
        arXiv:2409.17066.
    """

    indices: Tensor
    centroids: Tensor
    residual_indices: Tensor | None = None
    residual_centroids: Tensor | None = None
    column_scale: Tensor | None = None
    column_bias: Tensor | None = None
    shape: torch.Size = torch.Size()  # noqa: RUF009
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "shape", torch.Size(self.shape))
        if len(self.shape) != 2 or not all(self.shape):
            raise _checks.bad_value(name, "shape", "two sizes of at least 1", self.shape)
        if (self.residual_indices is None) != (self.residual_centroids is None):
            raise ValueError(f"{name}: residual_indices and residual_centroids come together")
        length = self._check_book(name, "", self.indices, self.centroids, None)
        if self.residual_indices is not None and self.residual_centroids is not None:
            books = self.residual_indices, self.residual_centroids
            self._check_book(name, "residual_", *books, length)
        for argument in ("column_scale", "column_bias"):
            value = getattr(self, argument)
            if value is not None:
                _checks.floating(name, argument, value)
                _checks.shape(name, argument, value, (self.shape[1],))
        if self.dtype is None:
            object.__setattr__(self, "dtype", torch.float32)
        elif not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise _checks.bad_type(name, "dtype", "a floating dtype", self.dtype)
        _checks.same_device(name, **self.tensors())

    def _check_book(
        self, name: str, prefix: str, indices: Tensor, centroids: Tensor, length: int | None
    ) -> int:
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
            raise _checks.bad_type(name, f"{prefix}indices", "a tensor of int64", indices)
        _checks.floating(name, f"{prefix}centroids", centroids)
        if centroids.dim() != 2 or not centroids.numel():
            raise _checks.bad_value(name, f"{prefix}centroids", "a non-empty matrix", centroids)
        length = centroids.shape[1] if length is None else length
        _checks.shape(name, f"{prefix}centroids", centroids, (len(centroids), length))
        rows, columns = self.shape
        _checks.shape(name, f"{prefix}indices", indices, (-(-rows // length), columns))
        count = len(centroids)
        if _checks.has_values(indices) and not ((indices >= 0) & (indices < count)).all():
            raise ValueError(f"{name}: {prefix}indices must be from 0 to {count - 1}")
        return length

    @property
    def bits_per_weight(self) -> float:
        """Bits of the indices for each weight; logarithms are not rounded up."""
        length = self.centroids.shape[1]
        books = (self.centroids, self.residual_centroids)
        return sum(math.log2(len(book)) for book in books if book is not None) / length

    @property
    def code_bits(self) -> float:
        """The same."""
        return self.bits_per_weight

    def limits(self) -> dict[str, int]:
        """The sizes of the codebooks."""
        limits = {"indices": len(self.centroids)}
        if self.residual_centroids is not None:
            limits["residual_indices"] = len(self.residual_centroids)
        return limits

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights that the indices stand for.

        Args:
            dtype: In the place of the one that the weights had before.

        Returns:
            Weights of shape (out, in).
        """
        vectors = self.centroids[self.indices]
        if self.residual_indices is not None and self.residual_centroids is not None:
            vectors = vectors + self.residual_centroids[self.residual_indices]
        rows, columns = self.shape
        weight = vectors.transpose(1, 2).reshape(-1, columns)[:rows]
        if self.column_scale is not None:
            weight = weight * self.column_scale
        if self.column_bias is not None:
            weight = weight + self.column_bias
        return weight.to(dtype or self.dtype)

    def __repr__(self) -> str:
        """In one line, without values."""
        vectors = " + ".join(
            f"{len(book)} vectors of {book.shape[1]}"
            for book in (self.centroids, self.residual_centroids)
            if book is not None
        )
        return f"{type(self).__name__}({tuple(self.shape)}, {vectors}, {self.dtype})"
