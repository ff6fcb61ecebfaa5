import dataclasses
from types import SimpleNamespace

import pytest
import torch

from tilework.bench import accuracy, runner
from tilework.bench.suites import Case, Unavailable
from tilework.bench.suites import losses as suite

CPU = torch.device("cpu")
KINDS = list(suite.FORMULAS)
CLASS_KINDS = (
    suite.CROSS_ENTROPY,
    suite.PLAIN,
    suite.SQUENTROPY,
    suite.COMP_SUM,
    suite.ERROR_NORM,
    suite.NUMBERS,
)
QUIET = runner.Settings(CPU, seconds=0.0, rounds=(2, 2), memory=False)


def case(kind: str, rows: int = 7, width: int = 33) -> Case:
    return Case(kind, {"N": rows, "C": width})


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_what_autograd_finds_in_float64(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "TRUTH_ELEMENTS", 100)  # three rows, and one in the last step
    inputs = suite.inputs(case(kind), torch.float64, CPU)
    truth = suite.truth(case(kind), inputs)
    tensors = (one.double() if one.is_floating_point() else one for one in inputs.values())
    loss = suite.FORMULAS[kind].composition(*tensors)
    (grad,) = torch.autograd.grad(loss, inputs["input"])
    rtol = 1e-6 if kind == suite.BALANCE else 1e-10  # the composition's shares are float32
    torch.testing.assert_close(truth["loss"], loss.detach(), rtol=rtol, atol=0)
    torch.testing.assert_close(truth["grad input"], grad, rtol=rtol, atol=rtol * 0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "candidate",
    [one for one in suite.SUITE.candidates if "compile" not in one.name],
    ids=lambda one: one.name,
)
def test_each_candidate_is_right_or_says_why_it_is_not_there(candidate, dtype, kind) -> None:
    inputs = suite.inputs(case(kind), getattr(torch, dtype), CPU)
    if candidate.devices == ("cuda",):
        with pytest.raises(Unavailable, match="runs on cuda"):
            candidate.bind(case(kind), inputs)
        return
    if candidate.package is not None:
        pytest.importorskip(candidate.package)
        if kind != suite.BALANCE:
            with pytest.raises(Unavailable, match=f"it has no {kind}"):
                candidate.bind(case(kind), inputs)
            return
    step = candidate.bind(case(kind), inputs)
    assert step.default != candidate.peer
    errors = accuracy.errors(step.run(), suite.truth(case(kind), inputs))
    assert max(errors.values()) < 20 * torch.finfo(getattr(torch, dtype)).eps


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_wrong_by_a_percent_is_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    formula = suite.FORMULAS[kind]

    def wrong(*inputs: torch.Tensor) -> torch.Tensor:
        loss = formula.ours(*inputs)
        return loss + 0.01 * (loss - loss.detach())

    monkeypatch.setitem(suite.FORMULAS, kind, dataclasses.replace(formula, ours=wrong))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    job = runner.Job(suite.SUITE, case(kind, rows=64), "float32")
    rows = {row.candidate: row for row in runner.measure(job, QUIET)}
    for name in ("tilework", "tilework (compiled)"):
        assert rows[name].status == "refused"
        assert str(rows[name].reason).startswith("the error of grad input is 0.01")
    assert rows["torch eager"].status == rows["torch compile"].status == "ok"


def test_a_peer_that_overwrites_its_input_gets_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    class LigerCrossEntropyLoss:
        def __init__(self, label_smoothing: float, lse_square_scale: float) -> None:
            assert lse_square_scale == suite.Z_LOSS
            assert label_smoothing == suite.SMOOTHING

        def __call__(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            loss = suite.FORMULAS[suite.CROSS_ENTROPY].composition(input * 1, target)
            with torch.no_grad():
                input.zero_()
            return loss

    module = SimpleNamespace(LigerCrossEntropyLoss=LigerCrossEntropyLoss)
    monkeypatch.setattr(suite, "import_module", lambda name: module)
    problem = case(suite.CROSS_ENTROPY)
    inputs = suite.inputs(problem, torch.float32, CPU)
    liger = next(one for one in suite.SUITE.candidates if one.name == "liger-kernel")
    step = liger.build(problem, inputs)
    for _ in range(2):
        errors = accuracy.errors(step.run(), suite.truth(problem, inputs))
        assert max(errors.values()) < 1e-6


def test_pytorch_optimizer_takes_probabilities_and_weighs_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class BCEFocalLoss:
        def __init__(self, alpha: float, gamma: float) -> None:
            self.alpha, self.gamma = alpha, gamma

        def __call__(self, p: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            positive = self.alpha * target * (1 - p) ** self.gamma * p.log()
            negative = (1 - self.alpha) * (1 - target) * p**self.gamma * (1 - p).log()
            return -(positive + negative).mean()

    module = SimpleNamespace(BCEFocalLoss=BCEFocalLoss)
    monkeypatch.setattr(suite, "import_module", lambda name: module)
    problem = case(suite.FOCAL)
    inputs = suite.inputs(problem, torch.float64, CPU)
    peer = next(one for one in suite.SUITE.candidates if one.name == "pytorch-optimizer")
    errors = accuracy.errors(peer.build(problem, inputs).run(), suite.truth(problem, inputs))
    assert max(errors.values()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_the_same_on_every_call(kind: str, dtype: torch.dtype) -> None:
    first, again = (suite.inputs(case(kind), dtype, CPU) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0, equal_nan=True)
    assert first["input"].dtype == dtype
    assert [name for name in first if first[name].requires_grad] == ["input"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_decides_neither_signs_nor_experts(dtype: torch.dtype) -> None:
    inputs = suite.inputs(case(suite.PINBALL, 10_000, 9), dtype, CPU)
    assert not (inputs["input"] == inputs["target"][:, None]).any()
    gate = suite.inputs(case(suite.BALANCE, 1000), dtype, CPU)["input"].detach().float()
    ordered = gate.sort(dim=1, descending=True).values
    assert (ordered[:, suite.CHOSEN - 1] - ordered[:, suite.CHOSEN]).min() > 0.45


def test_traffic_is_inputs_and_results_once() -> None:
    elements = 7 * 33
    for kind in CLASS_KINDS:
        assert suite.traffic(case(kind), torch.float32) == 8 * elements + 8 * 7
    assert suite.traffic(case(suite.FOCAL), torch.bfloat16) == 3 * 2 * elements
    assert suite.traffic(case(suite.HL_GAUSS), torch.bfloat16) == 4 * elements + 4 * 7
    assert suite.traffic(case(suite.PINBALL), torch.bfloat16) == 4 * elements + 2 * 7
    assert suite.traffic(case(suite.BALANCE), torch.bfloat16) == 4 * elements
    assert suite.flops(case(suite.BALANCE)) == 10 * elements


@pytest.mark.untyped
def test_the_runner_measures_the_suite_with_compiled_peers() -> None:
    job = runner.Job(suite.SUITE, case(suite.SQUENTROPY), "bfloat16")
    rows = {row.candidate: row.status for row in runner.measure(job, QUIET)}
    missing = {name for name, status in rows.items() if status == "missing"}
    assert missing == {"liger-kernel", "quack", "transformers", "pytorch-optimizer"}
    assert {status for name, status in rows.items() if name not in missing} == {"ok"}


def test_nothing_is_compiled_with_quick() -> None:
    (problem,) = (one for one in suite.cases("cpu") if one.quick)
    inputs = suite.inputs(problem, torch.float32, CPU)
    compiled = [one for one in suite.SUITE.candidates if "compile" in one.name]
    assert compiled
    for candidate in compiled:
        with pytest.raises(Unavailable, match="left out of --quick"):
            candidate.bind(problem, inputs)
