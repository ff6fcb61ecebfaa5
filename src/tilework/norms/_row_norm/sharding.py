"""How the operators of row norms treat distributed tensors: whole, or sharded before the rows.

Each rule lists the placements of results and of arguments that one dimension of a mesh may have.
"""

from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard

from tilework.norms._row_norm.common import Backward, Gradients, Normalized, RowNorm

_Rule = list[tuple[list[Any], list[Any]]]


def forward(given: RowNorm) -> _Rule:
    """The rule of the forward."""
    rule = []
    for tokens, parameter in _placements(given.input, given.weight, given.dims):
        results = {
            "output": tokens,
            "total": Replicate() if given.residual is None else tokens,
            "mean": tokens if given.centered else Replicate(),
            "rstd": tokens,
        }
        arguments = {"input": tokens, "residual": tokens, "weight": parameter, "bias": Replicate()}
        rule.append(([results[name] for name in Normalized._fields], _given(given, arguments)))
    return rule


def backward(given: Backward) -> _Rule:
    """The rule of the gradients."""
    rule = []
    for tokens, parameter in _placements(given.total, given.weight, given.dims):
        # Each process sums over the rows that it has.
        summed = Replicate() if tokens == Replicate() else Partial()
        results = {
            "total": tokens,
            "weight": parameter if parameter != Replicate() else summed,
            "bias": summed,
        }
        arguments = {
            "grad_output": tokens,
            "grad_total": tokens,
            "total": tokens,
            "weight": parameter,
            "bias": Replicate(),
            "mean": tokens if given.centered else Replicate(),
            "rstd": tokens,
        }
        needed = zip(Gradients._fields, given.needed, strict=True)
        gradients = [results[name] if need else Replicate() for name, need in needed]
        rule.append((gradients, _given(given, arguments)))
    return rule


def _given(given: RowNorm | Backward, placements: dict[str, Any]) -> list[Any]:
    """The placements of the tensors that are there, and None for all other arguments."""
    return [
        None if value is None else placements.get(name) for name, value in given._asdict().items()
    ]


def _placements(input: Any, weight: Any, dims: int) -> list[tuple[Any, Any]]:
    """How input and weight may lie; a weight for each head goes with the heads."""
    leading = input.ndim - dims
    per_head = weight is not None and weight.ndim > dims
    shards = (
        (Shard(dim), Shard(0) if per_head and dim == leading - 1 else Replicate())
        for dim in range(leading)
    )
    return [(Replicate(), Replicate()), *shards]
