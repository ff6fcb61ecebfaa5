"""Filters of next-token logits, against those of ``transformers``.

Sizes: ``B`` rows, ``V`` tokens. Each row has a temperature for which rounding hardly ever decides
which tokens are kept.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from tilework.bench.suites import Candidate, Case, Inputs, Results, Step, Suite
from tilework.decoding import typical_p

TYPICAL = "typical_p"
MASS = 0.9
TEMPERATURES = 50

Filter = Callable[[Tensor], Tensor]


def cases(device: str) -> list[Case]:
    """The vocabularies of two language models, and a small one for --quick."""
    rows = 8 if device == "cpu" else 256
    return [
        *(Case(TYPICAL, {"B": rows, "V": tokens}, ("float32",)) for tokens in (128256, 50304)),
        Case(TYPICAL, {"B": 4, "V": 4096}, ("float32",), quick=True),
    ]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Normal logits at each row's temperature."""
    rows, tokens = case.sizes.values()
    generator = torch.Generator(device).manual_seed(0)
    chosen = []
    for _ in range(rows):
        base = 3 * torch.randn(tokens, device=device, generator=generator)
        scaled = [(base * 0.99**step).to(dtype) for step in range(TEMPERATURES)]
        chosen.append(max(scaled, key=_margin))
    return {"logits": torch.stack(chosen)}


def _margin(logits: Tensor) -> float:
    return float(_typical(logits[None].double())[1])


def _typical(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The kept tokens' logits, and how far the choice is from another one.

    That is how far a sum of probabilities is from the one to keep, or the distance of the last kept
    token from that of its neighbors.
    """
    logs = logits.log_softmax(1)
    entropy = -(logs.exp() * logs).sum(1, keepdim=True)
    distances, order = (logs + entropy).abs().sort(dim=1, stable=True)
    sums = logs.exp().gather(1, order).cumsum(1)
    missing = sums < MASS
    last = missing.sum(1, keepdim=True)
    excluded = torch.empty_like(missing)
    excluded.scatter_(1, order, ~missing.roll(1, 1).index_fill(1, last.new_zeros(1), True))
    near = distances.gather(1, last + torch.arange(-1, 2, device=last.device))
    margins = torch.cat([(sums - MASS).abs(), near.diff(dim=1)], 1)
    return logits.masked_fill(excluded, -torch.inf), margins.amin(1)


def truth(case: Case, inputs: Inputs) -> Results:
    """The probabilities after the filter, by the definition in float64."""
    return {"probabilities": _typical(inputs["logits"].double())[0].softmax(1)}


def compared(results: Results) -> Results:
    """The probabilities that logits stand for."""
    return {"probabilities": results["logits"].float().softmax(1)}


def flops(case: Case) -> int:
    """Probabilities, entropy, distances and sums, about 10 for each token; not the sorting."""
    rows, tokens = case.sizes.values()
    return 10 * rows * tokens


def traffic(case: Case, dtype: torch.dtype) -> int:
    """Logits are read once and written once."""
    rows, tokens = case.sizes.values()
    return 2 * rows * tokens * dtype.itemsize


def _step(filter: Filter, inputs: Inputs, kernel: str) -> Step:
    logits = inputs["logits"]
    return Step(lambda: {"logits": filter(logits)}, kernel)


def _ours(case: Case, inputs: Inputs) -> Step:
    step = _step(lambda logits: typical_p(logits, MASS), inputs, "tilework decoding.typical_p")
    return Step(step.run, step.kernel, default=True)


def _composition(logits: Tensor) -> Tensor:
    logs = logits.log_softmax(1)
    probabilities = logs.exp()
    entropy = -(probabilities * logs).sum(1, keepdim=True)
    order = (logs + entropy).abs().sort(1).indices
    ordered = probabilities.gather(1, order)
    beyond = ordered.cumsum(1) - ordered >= MASS
    return logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)


def _eager(case: Case, inputs: Inputs) -> Step:
    return _step(_composition, inputs, "sort, cumsum and scatter")


def _compiled(case: Case, inputs: Inputs) -> Step:
    return _step(torch.compile(_composition, dynamic=False), inputs, "inductor of torch eager")


def _transformers(case: Case, inputs: Inputs) -> Step:
    process = import_module("transformers").TypicalLogitsWarper(mass=MASS)
    return _step(lambda logits: process(None, logits), inputs, "TypicalLogitsWarper")


SUITE = Suite(
    module=__name__,
    about="filters of next-token logits",
    cases=cases,
    inputs=inputs,
    candidates=(
        Candidate("tilework", _ours, peer=False),
        Candidate("torch eager", _eager),
        Candidate("torch compile", _compiled),
        Candidate(
            "transformers", _transformers, package="transformers", distribution="transformers"
        ),
    ),
    composition="torch eager",
    truth=truth,
    flops=flops,
    products=False,
    traffic=traffic,
    compared=compared,
)
