"""Statistics of parts of the classes, merged in one process."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tilework.losses._classes import sharding
from tilework.losses._classes.linear.common import LinearStats
from tilework.losses._classes.linear.operators import logit_stats
from tilework.losses._classes.statistics import Statistics
from tilework.losses.linear_kl_div import common, tiled
from tilework.losses.linear_kl_div.common import STUDENT, Heads

BOUNDS = [0, 7, 15, 20]


def biased(bias: Tensor, kind: str, part: int) -> Tensor:
    """All classes far below zero, and those of a part out of the question."""
    bias = bias - 1000
    if kind == "empty":
        bias[BOUNDS[part] : BOUNDS[part + 1]] = -torch.inf
    return bias


def merged(given: LinearStats, monkeypatch: pytest.MonkeyPatch) -> Statistics:
    """What the first of several processes makes of the parts of all."""
    ranges = list(pairwise(BOUNDS))
    sent: list[Tensor] = []
    results = []
    assert given.linear_bias is not None
    monkeypatch.setattr(sharding, "sum_gradient", lambda value, group: value)
    for gather in (lambda value: [*sent, value], lambda value: sent):
        for place, (start, stop) in enumerate(ranges):
            shard: Any = SimpleNamespace(start=start, stop=stop, ranges=ranges, group=None)

            def exchange(value: Tensor, _: Any, gather: Any = gather, place: int = place) -> Tensor:
                parts = gather(value)
                if len(sent) == place:
                    sent.append(value)
                return torch.stack((parts * len(ranges))[: len(ranges)])

            monkeypatch.setattr(sharding, "gather", exchange)
            local = given._replace(
                linear_weight=given.linear_weight[start:stop],
                linear_bias=given.linear_bias[start:stop],
            )
            results.append(sharding.logit_stats(shard, local))
    return results[len(ranges)]


@pytest.mark.untyped
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("kind", ["low", "empty"])
@pytest.mark.parametrize("implementation", ["reference", "tiled", "triton"])
def test_shards_far_below_zero(
    implementation: str, kind: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    input, weight, bias = torch.randn(6, 4), torch.randn(20, 4), torch.randn(20)
    target = torch.tensor([0, 7, 19, 8, 14, -100])
    given = LinearStats(
        input,
        weight,
        target,
        biased(bias, kind, part),
        None,
        None,
        1.0,
        -100,
        False,
        True,
        None,
        implementation,
    )
    expected = logit_stats(given._replace(implementation="reference"))
    found = merged(given, monkeypatch)
    for name, values, others in zip(Statistics._fields, found, expected, strict=True):
        torch.testing.assert_close(values, others, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("kind", ["low", "empty"])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_parts_of_two_heads_far_below_zero(divergence: str, kind: str, part: int) -> None:
    tensors = [torch.randn(shape).double() for shape in ((6, 4), (20, 4), (20,)) * 2]
    given = Heads(
        *tensors,  # type: ignore[arg-type]
        torch.ones(6, dtype=torch.bool),
        None,
        None,
        1.0,
        divergence,
        0.5,
        "tiled",
    )
    names = STUDENT[2], "teacher_bias"
    given = given._replace(**{name: biased(getattr(given, name), kind, part) for name in names})
    heads = (*STUDENT[1:], "teacher_weight", "teacher_bias")
    parts = [
        tiled.sums(given._replace(**{name: getattr(given, name)[start:stop] for name in heads}))
        for start, stop in pairwise(BOUNDS)
    ]
    torch.testing.assert_close(common.merge(torch.stack(parts), divergence), tiled.sums(given))
