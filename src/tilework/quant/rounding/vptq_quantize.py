"""VPTQ: columns become vectors of a codebook, and later ones make up for the errors."""

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import implements
from tilework.quant._arguments import check_hessian, check_weight, computed
from tilework.quant.grids.weighted_kmeans import nearest, weighted_kmeans
from tilework.quant.rounding._columns import Current, Problem, blocks, prepare, sweep
from tilework.quant.storage.vector_quantized_tensor import VectorQuantizedTensor

__all__ = ["vptq_quantize"]


class _VectorRounding:
    """Rounds columns to vectors of a codebook, and of one of residuals."""

    def __init__(self, problem: Problem, length: int, books: list[Tensor]) -> None:
        columns, rows = problem.columns.shape
        self._length = length
        self._books = books
        self._indices = problem.columns.new_empty(
            (len(books), columns, -(-rows // length)), dtype=torch.int64
        )
        self._problem = problem
        self.residuals = torch.empty_like(problem.columns)

    def begin(self, start: int, stop: int, current: Current) -> None:
        """Nothing depends on the block."""

    def column(self, position: int, following: Tensor) -> Tensor:
        """Take the nearest vectors, and keep their indices and what is left."""
        column = following[0]
        left = vectors_of(column.unsqueeze(0), self._length)
        values = torch.zeros_like(left)
        for book, indices in zip(self._books, self._indices, strict=True):
            indices[position] = nearest(left, book)
            values += book[indices[position]]
            left = left - book[indices[position]]
        rounded = values.flatten()[: len(column)]
        torch.sub(column, rounded, out=self.residuals[position])
        return rounded

    def restored(self, book: int) -> Tensor:
        """Indices into one of the books, in the original order of columns."""
        return self._problem.restored(self._indices[book])


def vectors_of(columns: Tensor, length: int) -> Tensor:
    """Columns, which lie along the last dimension, cut into vectors, the last filled with zeros."""
    missing = -columns.shape[1] % length
    return torch.nn.functional.pad(columns, (0, missing)).reshape(-1, length)


@implements(
    "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models",
    year=2024,
    arxiv="2409.17066",
)
@torch.no_grad()
@without_autocast
def vptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    *,
    vector_length: int = 8,
    num_centroids: int = 256,
    residual_centroids: int | None = None,
    act_order: bool = False,
    normalize: bool = False,
    block_size: int = 128,
    damp: float = 0.01,
    initial: Tensor | None = None,
    residual_initial: Tensor | None = None,
    iterations: int = 100,
    tol: float = 1e-5,
    generator: torch.Generator | None = None,
) -> VectorQuantizedTensor:
    r"""Weights as vectors of a codebook, rounded column by column as by :func:`gptq_quantize`.

    Each column is cut into vectors of ``vector_length`` consecutive rows. The codebook is that of
    :func:`weighted_kmeans` for all of them, with the diagonal entry of the Hessian of its column
    as the weight of each. Then, in the sweep of GPTQ, each vector of a column becomes the nearest
    of the codebook, and later columns make up for the error. With ``residual_centroids``, a second
    codebook is made of what is left, and the sweep is made again with both, from the beginning.

    ``normalize`` takes from each column its smallest weight :math:`b_j` and divides it by its range
    :math:`t_j`, and rescales the Hessian to :math:`t_i H_{ij} t_j`.

    Args:
        weight: Weights, of shape (out, in).
        hessian: As of :class:`HessianAccumulator`, of shape (in, in), symmetric.
        vector_length: Rows of a vector, at least 1.
        num_centroids: Vectors of the codebook, at least 1.
        residual_centroids: Vectors of the codebook of residuals, at least 1; None is no such book.
        act_order: Whether important columns come first.
        normalize: Whether columns are shifted and rescaled.
        block_size: Columns that are computed together; changes nothing but speed.
        damp: What is added to the diagonal of the Hessian, in units of its mean, at least 0.
        initial: The codebook to begin with, of shape (num_centroids, vector_length).
        residual_initial: That of residuals to begin with.
        iterations: Of :func:`weighted_kmeans`.
        tol: Of :func:`weighted_kmeans`.
        generator: What first codebooks are drawn from, by default torch's own.

    Returns:
        The quantized weights; they dequantize to the dtype of ``weight``.

    Raises:
        ValueError: A tensor is not of the shape above or not finite, the damped Hessian is not
            positive definite, or an option is not one of those above.
        TypeError: A tensor is not of a real floating dtype, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import vptq_quantize
        >>> weight = torch.tensor([[1.0, 5.0], [2.0, 6.0]])
        >>> book = torch.tensor([[1.0, 2.0], [5.0, 6.0]])
        >>> quantized = vptq_quantize(
        ...     weight, torch.eye(2), vector_length=2, num_centroids=2, initial=book
        ... )
        >>> quantized.indices
        tensor([[0, 1]])

    Deviations:
        The released code normalizes weights but not the Hessian, so that errors are made up for by
        the wrong amounts. Codebooks of outliers and product groups are left out.

    Reference:
        Yifei Liu, Jicheng Wen, Yang Wang, Shengyu Ye, Li Lyna Zhang, Ting Cao, Cheng Li, Mao Yang.
        VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models. 2024.
        arXiv:2409.17066.
    """
    name = "vptq_quantize"
    check_weight(name, weight)
    check_hessian(name, hessian, weight.shape[1])
    _checks.same_device(name, weight=weight, hessian=hessian)
    books = [("initial", num_centroids, initial)]
    _checks.count(name, "vector_length", vector_length)
    _checks.count(name, "num_centroids", num_centroids)
    if residual_centroids is not None:
        _checks.count(name, "residual_centroids", residual_centroids)
        books.append(("residual_initial", residual_centroids, residual_initial))
    elif residual_initial is not None:
        raise ValueError(f"{name}: residual_initial must be None without residual_centroids")
    for argument, count, given in books:
        if given is not None:
            check_weight(name, given, argument)
            _checks.shape(name, argument, given, (count, vector_length))
    _checks.count(name, "block_size", block_size)
    _checks.at_least(name, "damp", damp, 0)
    _checks.count(name, "iterations", iterations, 0)
    _checks.at_least(name, "tol", tol, 0)
    dtype = computed(weight, hessian, initial, residual_initial)
    values, hessian = weight.to(dtype), hessian.to(dtype)
    scale = bias = None
    if normalize:
        values = values.masked_fill(hessian.diagonal() == 0, 0.0)
        bias, top = values.aminmax(dim=0)
        scale = (top - bias).where(top > bias, 1.0)
        values, hessian = (values - bias) / scale, hessian * scale * scale.unsqueeze(1)
    problem = prepare(name, values, hessian, damp, act_order=act_order)
    importance = hessian.diagonal()
    if problem.order is not None:
        importance = importance[problem.order]
    vectors = vectors_of(problem.columns, vector_length)
    importance = importance.repeat_interleave(len(vectors) // len(importance))
    made: list[Tensor] = []
    for _, count, given in books:
        book, _ = weighted_kmeans(
            vectors,
            importance,
            num_centroids=count,
            initial=given,
            iterations=iterations,
            tol=tol,
            generator=generator,
        )
        made.append(book)
        rounding = _VectorRounding(problem, vector_length, made)
        sweep(problem, rounding, blocks(len(problem.columns), block_size))
        vectors = vectors_of(rounding.residuals, vector_length)
    has_residual = len(made) == 2
    return VectorQuantizedTensor(
        rounding.restored(0),
        made[0],
        residual_indices=rounding.restored(1) if has_residual else None,
        residual_centroids=made[1] if has_residual else None,
        column_scale=scale,
        column_bias=bias,
        shape=weight.shape,
        dtype=weight.dtype,
    )
