"""Scores by one matrix for each head, against those of queries and keys."""

import math
from typing import Any

import pytest
import torch

from tilework.quant import StatsQuantizer, qk_reparam_scores, statsq_quantize

import samples
from calls import Call, draw


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            qk_reparam_scores,
            lambda: {
                "input": draw(2, 3, 5),
                "query_weight": draw(8, 5),
                "key_weight": draw(8, 5),
            },
            differentiable=("input", "query_weight", "key_weight"),
            sizes={8: 16},
            options=({"num_heads": 2}, {"num_heads": 4, "scale": 0.3}),
        )
    ]


@pytest.mark.parametrize("scale", [None, -0.7])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_scores_are_those_of_queries_and_keys(num_heads: int, scale: float | None) -> None:
    input, query, key = draw(2, 7, 5), draw(6, 5), draw(6, 5)
    found = qk_reparam_scores(input, query, key, num_heads=num_heads, scale=scale)
    assert found.shape == (2, num_heads, 7, 7)
    size = 6 // num_heads
    factor = 1 / math.sqrt(size) if scale is None else scale
    for head in range(num_heads):
        rows = slice(head * size, (head + 1) * size)
        queries, keys = input @ query[rows].T, input @ key[rows].T
        truth = torch.einsum("bie,bje->bij", queries, keys) * factor
        torch.testing.assert_close(found[:, head], truth, rtol=1e-12, atol=1e-12)


def test_the_product_is_quantized() -> None:
    input, query, key = draw(2, 7, 5), draw(6, 5).requires_grad_(), draw(6, 5)
    shapes = []

    def quantizer(product: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(product.shape))
        return StatsQuantizer(2)(product)

    found = qk_reparam_scores(input, query, key, num_heads=2, quantizer=quantizer)
    assert shapes == [(10, 5)]
    for head in range(2):
        rows = slice(3 * head, 3 * head + 3)
        product = statsq_quantize(query[rows].detach().T @ key[rows], bits=2)
        truth = torch.stack([x @ product @ x.T for x in input]) / math.sqrt(3)
        torch.testing.assert_close(found[:, head].detach(), truth, rtol=1e-12, atol=1e-12)
    found.sum().backward()
    assert query.grad is not None
    assert query.grad.all()


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(3, 5)}, ValueError, "input must be of 3 dimensions"),
        ({"input": torch.ones(1, 3, 4)}, ValueError, "input must be of 5 features"),
        ({"input": torch.ones(1, 3, 5).long()}, TypeError, "input must be a floating-point"),
        ({"query_weight": torch.ones(6)}, ValueError, "query_weight must be of 2 dimensions"),
        ({"key_weight": torch.ones(4, 5)}, ValueError, r"key_weight must be of shape \(6, 5\)"),
        ({"num_heads": 4}, ValueError, "query_weight must be of a multiple of num_heads=4 rows"),
        ({"num_heads": 0}, ValueError, "num_heads must be an int of at least 1"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an int"),
        ({"scale": math.inf}, ValueError, "scale must be a finite number"),
        ({"quantizer": 3}, TypeError, "quantizer must be None or callable"),
        ({"quantizer": lambda w: w[1:]}, ValueError, "the result of quantizer must be of shape"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "input": torch.ones(1, 3, 5),
        "query_weight": torch.ones(6, 5),
        "key_weight": torch.ones(6, 5),
        "num_heads": 2,
    }
    qk_reparam_scores(**given)
    with pytest.raises(error, match=rf"^qk_reparam_scores: {message}"):
        qk_reparam_scores(**(given | change))
