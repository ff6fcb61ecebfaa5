"""Whether a candidate computes what it claims, against float64, before it is timed.

The error of a result is the larger of its relative errors in two norms: the Euclidean one, which
sees what is missing everywhere, and the maximum norm, which sees a single wrong row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tilework.bench.suites import Results


@dataclass(frozen=True)
class Rule:
    """The error may be ``factor`` yardsticks and ``units`` rounding units of the result's dtype."""

    factor: float
    units: float


OURS = Rule(2.0, 1.0)
PEER = Rule(10.0, 4.0)


def errors(results: Results, truth: Results) -> dict[str, float]:
    """The error of each result.

    Raises:
        ValueError: The results are not those of the truth, in name or in shape.
    """
    shapes = {name: tuple(value.shape) for name, value in results.items()}
    expected = {name: tuple(value.shape) for name, value in truth.items()}
    if shapes != expected:
        raise ValueError(f"the results have shapes {shapes}, the truth has {expected}")
    return {name: _error(results[name], value) for name, value in truth.items()}


def _error(result: torch.Tensor, truth: torch.Tensor) -> float:
    difference = result.detach().to(torch.float64, copy=True).sub_(truth)
    relative = []
    for norm in (2, math.inf):
        error = float(torch.linalg.vector_norm(difference, norm))
        size = float(torch.linalg.vector_norm(truth, norm))
        relative.append(error if error == 0 or size == 0 else error / size)
    return max(relative)


def limits(
    results: Results, composition: Mapping[str, float], dtype: torch.dtype, rule: Rule
) -> dict[str, float]:
    """The largest error that a rule allows for each result.

    The yardstick is the error of torch's plain composition in the same dtype, and at least half a
    rounding unit of that dtype: the error of a scalar can be small by luck, and the composition
    may not run at all where its logits do not fit in memory.
    """
    luck = torch.finfo(dtype).eps / 2
    return {
        name: rule.factor * max(composition.get(name, 0.0), luck)
        + rule.units * torch.finfo(result.dtype).eps
        for name, result in results.items()
    }


def composition_limits(results: Results, dtype: torch.dtype) -> dict[str, float]:
    """What the yardstick itself must keep: half of the dtype's digits."""
    return dict.fromkeys(results, math.sqrt(torch.finfo(dtype).eps))


def objection(measured: Mapping[str, float], allowed: Mapping[str, float]) -> str | None:
    """Why a candidate is refused, if it is."""
    wrong = [
        f"the error of {name} is {error:.2g}, at most {allowed[name]:.2g} is allowed"
        for name, error in measured.items()
        if not error <= allowed[name]
    ]
    return "; ".join(wrong) or None
