"""The suite of optimizers: its truths, what it counts, and its candidates."""

import pytest
import torch

from tilework import optim
from tilework.bench import accuracy
from tilework.bench.suites import Case, Unavailable
from tilework.bench.suites import optim as suite

CPU = torch.device("cpu")


def case(kind: str) -> Case:
    return Case(kind, {"L": 1, "D": 4, "V": 11})


def test_shapes_are_those_of_a_gpt() -> None:
    assert suite.elements(Case("adamw", {"T": 3, "E": 5})) == 15
    full = Case("adamw", {"L": 12, "D": 768, "V": 50304})
    layer = 12 * 768**2 + 2 * 768
    assert suite.elements(full) == 50304 * 768 + 12 * layer + 768


@pytest.mark.parametrize("kind", suite.KINDS)
def test_the_traffic_counts_the_states_that_there_are(kind: str) -> None:
    name, _, states = suite.KINDS[kind]
    parameter = torch.nn.Parameter(torch.randn(8, 8))
    parameter.grad = torch.randn(8, 8)
    optimizer = getattr(optim, name)([parameter], lr=0.1, **suite.OPTIONS.get(kind, {}))
    optimizer.step()
    held = sum(t.numel() for t in optimizer.state[parameter].values())
    assert states * 64 <= held < states * 64 + 32  # scalars, and Adafactor's rows and columns
    problem = Case(kind, {"T": 2, "E": 32})
    assert suite.traffic(problem, torch.float32) == 4 * 64 * (3 + 2 * states)


@pytest.mark.parametrize("kind", suite.KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "candidate",
    [one for one in suite.SUITE.candidates if "compiled" not in one.name],
    ids=lambda one: one.name,
)
def test_each_candidate_is_right_or_says_why_it_is_not_there(candidate, dtype, kind) -> None:
    problem = case(kind)
    inputs = suite.inputs(problem, getattr(torch, dtype), CPU)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    try:
        step = candidate.bind(problem, inputs)
    except Unavailable:
        if not candidate.peer:
            raise
        return
    found = suite.compared(step.run())
    errors = accuracy.errors(found, suite.truth(problem, inputs))
    assert max(errors.values()) < 10 * torch.finfo(getattr(torch, dtype)).eps
    for name, tensor in before.items():
        assert torch.equal(inputs[name], tensor)
