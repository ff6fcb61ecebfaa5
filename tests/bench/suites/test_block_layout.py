import pytest
import torch

from tilework.attention import BlockLayout
from tilework.bench import accuracy
from tilework.bench.suites import Case
from tilework.bench.suites import block_layout as suite

CPU = torch.device("cpu")
SIZES = {"L": 640, "H": 3, "K": 4}
CASES = [Case(kind, SIZES) for kind in (suite.ROWS, suite.BOTH)]


def test_the_truth_is_the_definition_row_by_row() -> None:
    inputs = suite.inputs(CASES[1], torch.float32, CPU)
    truth = suite.truth(CASES[1], inputs)
    for scores, active in zip(inputs["scores"][0], truth["rows"][0], strict=True):
        for row in range(10):
            before = sorted(range(row), key=lambda block: -float(scores[row, block]))
            kept = {row, *before[: SIZES["K"] - 1]}
            assert {int(block) for block in active[row].nonzero()} == kept
    assert torch.equal(truth["columns"], truth["rows"].mT)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
@pytest.mark.parametrize("candidate", suite.SUITE.candidates, ids=lambda one: one.name)
def test_each_candidate_is_right(candidate, case: Case) -> None:
    inputs = suite.inputs(case, torch.float32, CPU)
    step = candidate.bind(case, inputs)
    assert step.default != candidate.peer
    errors = accuracy.errors(suite.compared(step.run()), suite.truth(case, inputs))
    assert errors == dict.fromkeys(suite.truth(case, inputs), 0.0)


@pytest.mark.parametrize("lists", ["rows", "columns"])
def test_one_block_more_or_less_is_an_error(lists: str) -> None:
    inputs = suite.inputs(CASES[1], torch.float32, CPU)
    results = suite.SUITE.candidates[0].bind(CASES[1], inputs).run()
    results[f"{lists} counts"] = results[f"{lists} counts"].clone()
    results[f"{lists} counts"][0, 1, 5] -= 1
    errors = accuracy.errors(suite.compared(results), suite.truth(CASES[1], inputs))
    assert {name for name, error in errors.items() if error > 1e-2} == {lists}


def test_bytes() -> None:
    layout = BlockLayout.from_scores_topk(
        suite.inputs(CASES[1], torch.float32, CPU)["scores"], SIZES["K"], suite.BLOCK
    )
    rows = 4 * (layout.kv_num_blocks.numel() + layout.kv_indices.numel())
    assert suite.traffic(CASES[0], torch.float32) == 4 * 3 * 10 * 10 + rows
    assert suite.traffic(CASES[1], torch.float32) == 4 * 3 * 10 * 10 + 2 * rows
