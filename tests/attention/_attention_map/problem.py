"""Problems, and the map of attention that is stored."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from helpers import FLOATING, assert_exact, dtype_name

IMPLEMENTATIONS = ("reference", "tiled", "triton")
BUILT = [
    pytest.param(implementation, dtype, id=f"{implementation}-{dtype_name(dtype)}")
    for implementation in IMPLEMENTATIONS
    for dtype in FLOATING
    if (implementation, dtype) != ("triton", torch.float64)
]
LENGTHS = [(63, 100), (100, 63), (40, 33), (7, 64)]


def tensors(
    queries: int = 37,
    keys: int = 45,
    features: int = 12,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Query and key."""
    shapes = (batch, heads, queries, features), (batch, kv_heads, keys, features)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def scores(query: Tensor, key: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """All scores, of the query's dtype."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf) if is_causal else scores


def exact_lse(query: Tensor, key: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """The log-sum-exp in float64, as it is handed over."""
    result = scores(query.detach().double(), key.detach().double(), is_causal, scale).logsumexp(-1)
    return result.to(torch.promote_types(query.dtype, torch.float32))


def weights(
    query: Tensor, key: Tensor, lse: Tensor, is_causal: bool, scale: float | None
) -> Tensor:
    """The map under a log-sum-exp, from scores of the query's dtype."""
    values = scores(query, key, is_causal, scale)
    values = values.to(torch.promote_types(query.dtype, torch.float32))
    return (values - lse.to(values)[..., None]).exp()


def check(
    leaves: Sequence[Tensor],
    function: Callable[..., Tensor],
    composed: Callable[..., Tensor],
    differentiable: bool,
) -> Tensor:
    """Hold values and gradients to the error rule; return the values."""
    query = leaves[0]
    actual = function(*leaves)
    assert actual.dtype == torch.promote_types(query.dtype, torch.float32)
    assert actual.requires_grad == differentiable
    upstream = torch.randn(actual.shape).to(actual)
    same = torch.float32 if query.dtype == torch.float64 else query.dtype
    results = []
    for call, dtype in ((function, query.dtype), (composed, same), (composed, torch.float64)):
        copies = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        output = call(*copies)
        results.append([output.detach()])
        if differentiable:
            results[-1] += torch.autograd.grad((output * upstream.to(output)).sum(), copies)
    for values in zip(*results, strict=True):
        assert_exact(*values, query.dtype)
    return actual


def strided(tensor: Tensor) -> Tensor:
    """The same values in another order of memory."""
    order = [2, 0, 3, 1][: tensor.dim()] if tensor.dim() == 4 else [2, 0, 1]
    inverse = [order.index(dim) for dim in range(tensor.dim())]
    moved = tensor.detach().permute(order).contiguous().permute(inverse)
    return moved.requires_grad_(tensor.requires_grad)
