"""A suite with candidates that are right, wrong, absent and broken, for the tests of the runner."""

from collections.abc import Callable

import torch
from torch import Tensor

from tilework.bench.suites import (
    Candidate,
    Case,
    Growth,
    Inputs,
    Results,
    Step,
    Suite,
    Unavailable,
)


def cases(device: str) -> list[Case]:
    return [
        Case("square", {"n": 8}, ("float32",)),
        Case("square", {"n": 1000}, ("float32",)),
        Case("square", {"n": 4000}, ("float32",)),
        Case("square", {"n": 16}, ("float32", "bfloat16"), quick=True),
        Case("interrupted", {"n": 8}, ("float32",)),
    ]


def inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    return {"input": torch.linspace(1, 2, case.sizes["n"], device=device).to(dtype)}


def truth(case: Case, inputs: Inputs) -> Results:
    return {"square": inputs["input"].double().pow(2)}


def candidate(name: str, square: Callable[[Tensor], Tensor], *, peer: bool = True) -> Candidate:
    def build(case: Case, inputs: Inputs) -> Step:
        def run() -> Results:
            if case.kind == "interrupted" and name == "torch eager":
                raise KeyboardInterrupt
            return {"square": square(inputs["input"])}

        return Step(run, f"kernel of {name}", default=not peer, facts={"kept": 0.25})

    return Candidate(name, build, peer)


def unavailable(case: Case, inputs: Inputs) -> Step:
    raise Unavailable("it needs a full moon")


def broken(input: Tensor) -> Tensor:
    raise RuntimeError("out of luck\nand more")


def absent(case: Case, inputs: Inputs) -> Step:
    raise AssertionError("built although its package is missing")


SUITE = Suite(
    module=__name__,
    about="squares",
    cases=cases,
    inputs=inputs,
    candidates=(
        candidate("tilework square", lambda x: x * x, peer=False),
        candidate("tilework wrong", lambda x: x * x * (1 + 2**-6), peer=False),
        candidate("torch eager", lambda x: x.pow(2)),
        candidate("peer inexact", lambda x: x * x * (1 + 4 * torch.finfo(x.dtype).eps)),
        candidate("peer nan", lambda x: (x * x).masked_fill(x == x[0], torch.nan)),
        candidate("peer short", lambda x: (x * x)[1:]),
        candidate("peer broken", broken),
        Candidate("peer unavailable", unavailable),
        Candidate("peer absent", absent, package="no_such_module", distribution="no-such-package"),
        Candidate("peer elsewhere", absent, devices=("no-such-device",)),
    ),
    composition="torch eager",
    truth=truth,
    flops=lambda case: 10**6 * case.sizes["n"],
    products=False,
    traffic=lambda case, dtype: 2 * dtype.itemsize * case.sizes["n"],
    growth=(
        Growth("n", tuple(Case("square", {"n": 2**power}, ("float32",)) for power in range(3, 11))),
    ),
)
