import pytest
import torch

from tilework.bench import accuracy
from tilework.bench.suites import Case
from tilework.bench.suites import decoding as suite

CPU = torch.device("cpu")
CASE = Case(suite.TYPICAL, {"B": 3, "V": 500})


def test_the_truth_is_the_definition_token_by_token() -> None:
    inputs = suite.inputs(CASE, torch.float32, CPU)
    truth = suite.truth(CASE, inputs)["probabilities"]
    for row, found in zip(inputs["logits"].double(), truth, strict=True):
        p = row.softmax(0)
        entropy = -float((p * p.log()).sum())
        order = sorted(range(len(p)), key=lambda token: abs(-float(p[token].log()) - entropy))
        kept, total = [], 0.0
        for token in order:
            if total >= suite.MASS:
                break
            kept.append(token)
            total += float(p[token])
        expected = torch.zeros_like(p)
        expected[kept] = p[kept] / p[kept].sum()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("case", [CASE, *(one for one in suite.cases("cpu") if one.quick)])
def test_rounding_does_not_decide(case: Case) -> None:
    inputs = suite.inputs(case, torch.float32, CPU)
    again = suite.inputs(case, torch.float32, CPU)
    assert torch.equal(inputs["logits"], again["logits"])
    for row in inputs["logits"]:
        assert suite._margin(row) > 1e-4


@pytest.mark.parametrize(
    "candidate",
    [one for one in suite.SUITE.candidates if one.name != "torch compile"],
    ids=lambda one: one.name,
)
def test_each_candidate_is_right(candidate) -> None:
    if candidate.package is not None:
        pytest.importorskip(candidate.package)
    inputs = suite.inputs(CASE, torch.float32, CPU)
    step = candidate.bind(CASE, inputs)
    assert step.default != candidate.peer
    errors = accuracy.errors(suite.compared(step.run()), suite.truth(CASE, inputs))
    assert errors["probabilities"] < 1e-6


def test_one_token_more_or_less_is_an_error() -> None:
    inputs = suite.inputs(CASE, torch.float32, CPU)
    truth = suite.truth(CASE, inputs)
    kept = suite._composition(inputs["logits"])
    token = int(kept[0].masked_fill(kept[0].isinf(), torch.inf).argmin())
    kept[0, token] = -torch.inf
    assert accuracy.errors(suite.compared({"logits": kept}), truth)["probabilities"] > 1e-5


def test_costs_count_logits_once_in_and_once_out() -> None:
    assert suite.traffic(CASE, torch.float32) == 2 * 3 * 500 * 4
    assert suite.flops(CASE) == 10 * 3 * 500
