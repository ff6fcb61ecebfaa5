"""How the operators of row norms treat distributed tensors: whole, or sharded before the rows.

Each rule lists the placements of results and of arguments that one dimension of a mesh may have.
"""

from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard

_Rule = list[tuple[list[Any], list[Any]]]


def forward(input: Any, residual: Any, weight: Any, bias: Any, dims: int, *options: Any) -> _Rule:
    """Of output, sum, mean and rstd."""
    *_, centered, _implementation = options
    return [
        (
            [
                tokens,
                Replicate() if residual is None else tokens,
                tokens if centered else Replicate(),
                tokens,
            ],
            [
                tokens,
                None if residual is None else tokens,
                None if weight is None else parameter,
                None if bias is None else Replicate(),
                *[None] * (1 + len(options)),
            ],
        )
        for tokens, parameter in _placements(input, weight, dims)
    ]


def backward(
    grad_output: Any,
    grad_total: Any,
    total: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    rstd: Any,
    dims: int,
    *options: Any,
) -> _Rule:
    """Of the gradients of sum, weight and bias."""
    *_, centered, _dtype, needed, _implementation = options
    rule = []
    for tokens, parameter in _placements(total, weight, dims):
        # Each process sums over the rows that it has.
        summed = Replicate() if tokens == Replicate() else Partial()
        gradients = (tokens, parameter if parameter != Replicate() else summed, summed)
        rule.append(
            (
                [
                    gradient if need else Replicate()
                    for gradient, need in zip(gradients, needed, strict=True)
                ],
                [
                    tokens,
                    None if grad_total is None else tokens,
                    tokens,
                    None if weight is None else parameter,
                    None if bias is None else Replicate(),
                    tokens if centered else Replicate(),
                    tokens,
                    *[None] * (1 + len(options)),
                ],
            )
        )
    return rule


def _placements(input: Any, weight: Any, dims: int) -> list[tuple[Any, Any]]:
    """How input and weight may lie; a weight for each head goes with the heads."""
    leading = input.ndim - dims
    per_head = weight is not None and weight.ndim > dims
    shards = (
        (Shard(dim), Shard(0) if per_head and dim == leading - 1 else Replicate())
        for dim in range(leading)
    )
    return [(Replicate(), Replicate()), *shards]
