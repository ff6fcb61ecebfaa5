import pytest
import torch

from tilework.bench import accuracy
from tilework.bench.suites import Case
from tilework.bench.suites import linear_kl_div as suite

from losses.linear_kl_div.problem import composed

CPU = torch.device("cpu")


def case(kind: str, tokens: int = 7) -> Case:
    return Case(kind, {"N": tokens, "D": 12, "E": 5, "V": 33})


@pytest.mark.parametrize("kind", suite.DIVERGENCES)
@pytest.mark.parametrize("tokens", [7, suite.TRUTH_ROWS + 3])
def test_the_truth_is_what_autograd_finds_in_float64(kind: str, tokens: int) -> None:
    inputs = suite.inputs(case(kind, tokens), torch.float64, CPU)
    truth = suite.truth(case(kind, tokens), inputs)
    loss = composed(*inputs.values(), divergence=suite.DIVERGENCES[kind], beta=suite.BETA)
    gradients = torch.autograd.grad(loss, (inputs["input"], inputs["weight"]))
    expected = {"loss": loss.detach(), "grad input": gradients[0], "grad weight": gradients[1]}
    assert truth.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(truth[name], value, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", suite.DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_candidate_is_right(kind: str, dtype: torch.dtype) -> None:
    inputs = suite.inputs(case(kind), dtype, CPU)
    truth = suite.truth(case(kind), inputs)
    by_name = {one.name: one for one in suite.SUITE.candidates}
    yardstick = accuracy.errors(by_name["torch eager"].build(case(kind), inputs).run(), truth)
    for name in ("tilework tiled", "tilework reference"):
        results = by_name[name].build(case(kind), inputs).run()
        allowed = accuracy.limits(results, yardstick, dtype, accuracy.OURS)
        assert accuracy.objection(accuracy.errors(results, truth), allowed) is None


def test_work_is_that_of_the_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    problem = case(suite.JSD)
    inputs = suite.inputs(problem, torch.float32, CPU)
    with FlopCounterMode(display=False) as counter:
        suite._eager(problem, inputs).run()
    assert suite.flops(problem) == counter.get_total_flops()
    assert suite.traffic(problem, torch.bfloat16) == 2 * (7 + 33) * (2 * 12 + 5)
