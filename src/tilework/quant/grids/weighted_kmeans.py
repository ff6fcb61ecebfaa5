"""Codebooks of vectors: k-means with a weight for each vector."""

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import implements
from tilework.quant._arguments import check_finite, check_weight, computed

__all__ = ["weighted_kmeans"]

_ELEMENTS = 2**20
"""Of working memory, distances from vectors to centroids."""


@implements(
    "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models",
    year=2024,
    arxiv="2409.17066",
)
@torch.no_grad()
@without_autocast
def weighted_kmeans(
    vectors: Tensor,
    weight: Tensor | None = None,
    *,
    num_centroids: int,
    initial: Tensor | None = None,
    iterations: int = 100,
    tol: float = 1e-5,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Centroids that vectors are near to, by Lloyd's algorithm with weights.

    In each round every vector :math:`v_n` of weight :math:`\omega_n` goes to the nearest centroid
    :math:`c`, the first one of several, and every centroid becomes the weighted mean of its
    vectors; one whose vectors weigh nothing stays. Rounds end as soon as the inertia

    .. math::

        J = \sum_n \omega_n \lVert v_n - c(n) \rVert^2

    falls by no more than the part ``tol`` of it.

    Args:
        vectors: Of shape (n, length).
        weight: Weights of at least 0, of shape (n,); None is 1 for each.
        num_centroids: The number of centroids, at least 1.
        initial: Centroids to begin with, of shape (num_centroids, length); None draws different
            vectors, each with a probability in proportion to its weight. If there are fewer, the
            first one is taken for the rest.
        iterations: The largest number of rounds, at least 0.
        tol: At least 0.
        generator: What is drawn from, by default torch's own.

    Returns:
        The centroids, float64 if a tensor is and otherwise float32, and for each vector the index
        of its nearest one, int64 of shape (n,).

    Raises:
        ValueError: A tensor is of another shape, empty or not finite, a weight is below 0, or a
            number is out of its range.
        TypeError: A tensor is not of a real floating dtype, or a number of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import weighted_kmeans
        >>> vectors = torch.tensor([[0.0], [1.0], [10.0], [14.0]])
        >>> weight = torch.tensor([1.0, 1.0, 3.0, 1.0])
        >>> weighted_kmeans(vectors, weight, num_centroids=2, initial=vectors[:2])
        (tensor([[ 0.5000],
                [11.0000]]), tensor([0, 0, 1, 1]))

    Deviations:
        The released code calls a library that begins at random and differs between runs.

    Reference:
        Yifei Liu, Jicheng Wen, Yang Wang, Shengyu Ye, Li Lyna Zhang, Ting Cao, Cheng Li, Mao Yang.
        VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models. 2024.
        arXiv:2409.17066.
    """
    name = "weighted_kmeans"
    check_weight(name, vectors, "vectors")
    count, length = vectors.shape
    _checks.count(name, "num_centroids", num_centroids)
    _checks.count(name, "iterations", iterations, 0)
    _checks.at_least(name, "tol", tol, 0)
    if weight is not None:
        _checks.floating(name, "weight", weight)
        _checks.shape(name, "weight", weight, (count,))
        check_finite(name, "weight", weight)
        _checks.same_device(name, vectors=vectors, weight=weight)
        if _checks.has_values(weight) and (weight < 0).any():
            raise ValueError(f"{name}: weight must be at least 0 everywhere")
    if initial is not None:
        check_weight(name, initial, "initial")
        _checks.shape(name, "initial", initial, (num_centroids, length))
        _checks.same_device(name, vectors=vectors, initial=initial)
    dtype = computed(vectors, weight, initial)
    vectors = vectors.to(dtype)
    weight = vectors.new_ones(count) if weight is None else weight.to(dtype)
    if initial is None:
        centroids = _drawn(vectors, weight, num_centroids, generator)
    else:
        centroids = initial.to(dtype, copy=True)
    before = torch.inf
    for _ in range(iterations):
        indices = nearest(vectors, centroids)
        inertia = float(weight @ (vectors - centroids[indices]).square().sum(1))
        if before - inertia <= tol * before < torch.inf:
            break
        before = inertia
        centroids = _means(vectors, weight, indices, centroids)
    return centroids, nearest(vectors, centroids)


def _drawn(
    vectors: Tensor, weight: Tensor, count: int, generator: torch.Generator | None
) -> Tensor:
    """Different vectors, each as probable as its weight says: those whose clock rings first."""
    clocks = torch.empty_like(weight).exponential_(generator=generator) / weight
    first = clocks.topk(min(count, len(weight)), largest=False).indices
    rest = first[:1].new_zeros(count - len(first))
    return vectors[torch.cat([first if len(rest) == 0 else first.sort().values, rest])]


def _means(vectors: Tensor, weight: Tensor, indices: Tensor, centroids: Tensor) -> Tensor:
    """The weighted mean of the vectors of each centroid."""
    order = indices.argsort(stable=True)  # sums in one order, on a GPU too
    lengths = indices.bincount(minlength=len(centroids))
    weighted = torch.cat([vectors * weight.unsqueeze(1), weight.unsqueeze(1)], 1)[order]
    sums = torch.segment_reduce(weighted, "sum", lengths=lengths, axis=0, unsafe=True)
    sums, totals = sums[:, :-1], sums[:, -1]
    weighs = (totals > 0).unsqueeze(1)
    return (sums / totals.unsqueeze(1)).where(weighs, centroids)


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """The index of the centroid that is nearest to each vector, the first one of several."""
    squares = centroids.square().sum(1)
    eps = 16 * torch.finfo(vectors.dtype).eps
    parts = []
    for part in torch.split(vectors, max(_ELEMENTS // len(centroids), 1)):
        scores = torch.addmm(squares, part, centroids.mT, alpha=-2)
        margin = eps * (part.square().sum(1) + squares.amax())
        near = scores <= (scores.amin(1) + margin).unsqueeze(1)
        rows, columns = near.nonzero(as_tuple=True)
        if len(rows) > len(part):  # as far as rounding reaches, the differences themselves decide
            exact = (part[rows] - centroids[columns]).square().sum(1)
            least = exact.new_full((len(part),), torch.inf)
            least.scatter_reduce_(0, rows, exact, "amin")
            is_least = exact == least[rows]
            first = columns.new_full((len(part),), len(centroids))
            columns = first.scatter_reduce_(0, rows[is_least], columns[is_least], "amin")
        parts.append(columns)
    return torch.cat(parts)
