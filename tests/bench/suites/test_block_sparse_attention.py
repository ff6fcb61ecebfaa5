import pytest
import torch
import torch.nn.functional as F

from tilework.bench.suites import Case, Unavailable
from tilework.bench.suites import block_sparse_attention as suite

CPU = torch.device("cpu")
KINDS = (suite.FORWARD, suite.TRAINING)


def case(kind: str, kept: int = 2) -> Case:
    return Case(kind, {"L": 256, "H": 2, "E": 16, "K": kept})


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_what_autograd_finds_in_float64(kind: str) -> None:
    problem = case(kind)
    inputs = suite.inputs(problem, torch.float64, CPU)
    tensors = [inputs[name] for name in suite.NAMES]
    blocks = inputs["active"].repeat_interleave(64, 2).repeat_interleave(64, 3)
    output = F.scaled_dot_product_attention(*tensors, attn_mask=blocks.tril())
    expected = {"output": output.detach()}
    if kind == suite.TRAINING:
        grads = torch.autograd.grad(output, tensors, inputs["upstream"])
        expected |= {f"grad {name}": g for name, g in zip(suite.NAMES, grads, strict=True)}
    truth = suite.truth(problem, inputs)
    assert truth.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(truth[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_pairs_are_those_that_see_each_other(kept: int) -> None:
    problem = case(suite.FORWARD, kept)
    active = suite.inputs(problem, torch.float32, CPU)["active"]
    visible = active.repeat_interleave(64, 2).repeat_interleave(64, 3).tril()
    assert suite.pairs(problem) == int(visible.sum())
    assert suite.flops(problem) == 2 * 2 * 16 * int(visible.sum())
    training = Case(suite.TRAINING, problem.sizes)
    assert suite.flops(training) == 7 * 2 * 16 * int(visible.sum())
    assert suite.traffic(training, torch.bfloat16) == 8 * 256 * 2 * 16 * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [2, 4])
def test_candidates_are_right_or_say_why_not(kind: str, kept: int) -> None:
    problem = case(kind, kept)
    inputs = suite.inputs(problem, torch.float32, CPU)
    truth = suite.truth(problem, inputs)
    unavailable = {}
    for candidate in suite.SUITE.candidates:
        if "compiled" in candidate.name and kind == suite.FORWARD:
            continue
        try:
            results = candidate.bind(problem, inputs).run()
        except Unavailable as reason:
            unavailable[candidate.name] = str(reason)
            continue
        assert results.keys() == truth.keys()
        for name, value in results.items():
            torch.testing.assert_close(value.double(), truth[name], rtol=1e-4, atol=1e-5)
    expected = {"tilework triton"}
    if kept == 2:
        expected.add("torch sdpa (causal)")
    if kind == suite.TRAINING:
        expected.add("torch flex_attention (compiled)")
    assert unavailable.keys() == expected


def test_cases_start_with_the_sizes_of_the_claims() -> None:
    assert suite.cases("cpu")[0].name == "forward L=8192 H=4 E=64 K=8"
    assert suite.cases("cuda")[0].name == "forward L=32768 H=32 E=128 K=32"
    assert any(one.quick for one in suite.cases("cpu"))
