from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tilework.bench import accuracy, runner
from tilework.bench.suites import Case, Unavailable
from tilework.bench.suites import linear_cross_entropy as suite

CPU = torch.device("cpu")
KINDS = (suite.FORWARD, suite.TRAINING, suite.PEAKED)
COMPILED = ("torch compile", "cut-cross-entropy (compiled)")


def case(kind: str, tokens: int = 7) -> Case:
    return Case(kind, {"N": tokens, "D": 12, "V": 33})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [7, suite.TRUTH_ROWS + 3])
def test_the_truth_is_what_autograd_finds_in_float64(kind: str, tokens: int) -> None:
    problem = case(kind, tokens)
    inputs = suite.inputs(problem, torch.float64, CPU)
    truth = suite.truth(problem, inputs)
    loss = F.cross_entropy(F.linear(inputs["input"], inputs["weight"]), inputs["target"])
    expected = {"loss": loss.detach()}
    if kind != suite.FORWARD:
        gradients = torch.autograd.grad(loss, (inputs["input"], inputs["weight"]))
        expected |= dict(zip(("grad input", "grad weight"), gradients, strict=True))
    assert truth.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(truth[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_the_same_on_every_call(dtype: torch.dtype) -> None:
    first, again = (suite.inputs(case(suite.TRAINING), dtype, CPU) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["input"].dtype == first["weight"].dtype == dtype
    assert first["input"].requires_grad
    assert not suite.inputs(case(suite.FORWARD), dtype, CPU)["input"].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_the_products(kind: str) -> None:
    problem = case(kind)
    inputs = suite.inputs(problem, torch.float32, CPU)
    step = next(one for one in suite.SUITE.candidates if one.name == "torch eager")
    with FlopCounterMode(display=False) as counter:
        step.bind(problem, inputs).run()
    assert suite.flops(problem) == counter.get_total_flops()


def test_traffic_is_inputs_and_results_once() -> None:
    elements = (7 + 33) * 12
    assert suite.traffic(case(suite.FORWARD), torch.float32) == 4 * elements + 8 * 7
    assert suite.traffic(case(suite.TRAINING), torch.bfloat16) == 2 * 2 * elements + 8 * 7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "candidate",
    [one for one in suite.SUITE.candidates if one.name not in COMPILED],
    ids=lambda one: one.name,
)
def test_each_candidate_is_right_or_says_why_it_is_not_there(candidate, dtype: str) -> None:
    problem = case(suite.TRAINING)
    inputs = suite.inputs(problem, getattr(torch, dtype), CPU)
    if candidate.devices == ("cuda",):
        with pytest.raises(Unavailable, match="runs on cuda"):
            candidate.bind(problem, inputs)
        return
    if "fused" in candidate.name and not hasattr(F, "linear_cross_entropy"):
        with pytest.raises(Unavailable, match=r"has no F\.linear_cross_entropy"):
            candidate.bind(problem, inputs)
        return
    step = candidate.bind(problem, inputs)
    results = step.run()
    errors = accuracy.errors(results, suite.truth(problem, inputs))
    assert max(errors.values()) < 10 * torch.finfo(getattr(torch, dtype)).eps
    assert step.kernel


def test_flash_linear_attention_takes_the_weight_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x @ weight.T, target)

    module = SimpleNamespace(FusedLinearCrossEntropyLoss=lambda: loss)
    monkeypatch.setattr(suite, "import_module", lambda name: module)
    problem = case(suite.TRAINING)
    inputs = suite.inputs(problem, torch.float64, CPU)
    peer = next(one for one in suite.SUITE.candidates if one.name == "flash-linear-attention")
    errors = accuracy.errors(peer.build(problem, inputs).run(), suite.truth(problem, inputs))
    assert max(errors.values()) < 1e-12


@pytest.mark.untyped
def test_the_runner_measures_the_suite_with_compiled_peers() -> None:
    job = runner.Job(suite.SUITE, case(suite.TRAINING), "float32")
    settings = runner.Settings(CPU, seconds=0, rounds=(2, 2), memory=False)
    names = {"tilework tiled", "torch compile", "cut-cross-entropy (compiled)"}
    rows = {
        row.candidate: row for row in runner.measure(job, settings, lambda one: one.name in names)
    }
    assert rows["tilework tiled"].status == "ok"
    assert rows["torch compile"].status == "ok"
    assert rows["cut-cross-entropy (compiled)"].status in ("ok", "missing")


@pytest.mark.untyped
@pytest.mark.parametrize("implementation", ["tiled", "triton"])
def test_peaked_logits_keep_few_classes(implementation: str) -> None:
    # Some seconds, in the interpreter: fewer classes are not peaked enough.
    name = f"tilework {implementation} (filter)"
    filtered = next(one for one in suite.SUITE.candidates if one.name == name)
    kept = {}
    for kind in (suite.TRAINING, suite.PEAKED):
        problem = Case(kind, {"N": 7, "D": 12, "V": 3000})
        inputs = suite.inputs(problem, torch.bfloat16, CPU)
        kept[kind] = filtered.build(problem, inputs).facts["kept"]
    assert kept[suite.PEAKED] < 0.6
    assert kept[suite.TRAINING] > 0.9
    with pytest.raises(Unavailable, match="for gradients"):
        filtered.build(case(suite.FORWARD), inputs)
