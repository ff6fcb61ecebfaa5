"""A suite whose candidates need a known amount of memory."""

import torch

from tilework.bench.suites import Candidate, Case, Inputs, Results, Step, Suite

N = 16_000_000  # 64 MB in float32


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {"input": torch.ones(case.sizes["n"], dtype=dtype, device=device)}


def truth(case: Case, inputs: Inputs) -> Results:
    return {"result": inputs["input"].double() + 1}


def three(case: Case, inputs: Inputs) -> Step:
    def run() -> Results:
        doubled = inputs["input"] + 1
        halved = doubled - 2
        del doubled
        return {"result": halved + 2}

    return Step(run, "")


def at_first(case: Case, inputs: Inputs) -> Step:
    runs = 0

    def run() -> Results:
        nonlocal runs
        runs += 1
        waste = torch.ones((4 if runs == 1 else 0) * N)
        return {"result": (inputs["input"] + 1).add_(waste.sum() * 0)}

    return Step(run, "")


SUITE = Suite(
    module=__name__,
    about="memory",
    cases=lambda device: [Case("add", {"n": N}, ("float32",))],
    inputs=inputs,
    candidates=(
        Candidate("three at once, two live", three),
        Candidate("hungry at first", at_first),
    ),
    composition="hungry at first",
    truth=truth,
    flops=lambda case: 1,
    products=False,
    traffic=lambda case, dtype: 1,
)
