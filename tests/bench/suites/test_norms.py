from types import SimpleNamespace

import pytest
import torch

from tilework.bench import accuracy, runner
from tilework.bench.suites import Case, Unavailable
from tilework.bench.suites import norms as suite

CPU = torch.device("cpu")
KINDS = [f"{norm} {what}" for norm in suite._NORMS for what in suite._WHATS]


def case(kind: str, rows: int = 7) -> Case:
    return Case(kind, {"M": rows, "N": 12})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [7, suite.TRUTH_ROWS + 3])
def test_the_truth_is_what_autograd_finds_in_float64(kind: str, rows: int) -> None:
    problem = case(kind, rows)
    inputs = suite.inputs(problem, torch.float64, CPU)
    truth = suite.truth(problem, inputs)
    expected = suite._eager(problem, inputs).run()
    assert truth.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(truth[name], value, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "candidate",
    [one for one in suite.SUITE.candidates if one.name != "torch compile"],
    ids=lambda one: one.name,
)
def test_each_candidate_is_right_or_says_why_it_is_not_there(candidate, dtype, kind) -> None:
    problem = case(kind)
    inputs = suite.inputs(problem, getattr(torch, dtype), CPU)
    if candidate.devices == ("cuda",):
        with pytest.raises(Unavailable, match="runs on cuda"):
            candidate.bind(problem, inputs)
        return
    errors = accuracy.errors(candidate.bind(problem, inputs).run(), suite.truth(problem, inputs))
    assert max(errors.values()) < 10 * torch.finfo(getattr(torch, dtype)).eps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["flash-attn", "flash-linear-attention"])
def test_peers_for_cuda_are_called_as_they_want_it(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def layer_norm(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None = None,
        eps: float = 1e-6,
        prenorm: bool = False,
        is_rms_norm: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert eps == suite.EPS
        total = x if residual is None else x + residual
        centered = total if is_rms_norm else total - total.mean(1, keepdim=True)
        scale = (centered.square().mean(1, keepdim=True) + eps).rsqrt()
        output = centered * scale * weight + (0 if bias is None else bias)
        return (output, total) if prenorm else output

    module = SimpleNamespace(layer_norm=layer_norm, layer_norm_fn=layer_norm)
    monkeypatch.setattr(suite, "import_module", lambda name: module)
    problem = case(kind)
    inputs = suite.inputs(problem, torch.float64, CPU)
    candidate = next(one for one in suite.SUITE.candidates if one.name == name)
    errors = accuracy.errors(candidate.build(problem, inputs).run(), suite.truth(problem, inputs))
    assert max(errors.values()) < 1e-12


def test_traffic_counts_tensors_of_rows() -> None:
    size = 7 * 12 * 2
    tensors = {kind: suite.traffic(case(kind), torch.bfloat16) // size for kind in KINDS[:4]}
    assert list(tensors.values()) == [2, 3, 4, 4]
    assert suite.flops(case("rms backward")) == 10 * 7 * 12


def test_inputs_are_the_same_on_every_call() -> None:
    problem = case("layer residual backward")
    first, again = (suite.inputs(problem, torch.float32, CPU) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["weight"].requires_grad
    assert not suite.inputs(case("rms forward"), torch.float32, CPU)["input"].requires_grad


@pytest.mark.untyped
def test_the_runner_measures_the_suite_with_its_peers() -> None:
    job = runner.Job(suite.SUITE, case("rms residual backward"), "float32")
    settings = runner.Settings(CPU, seconds=0, rounds=(2, 2), memory=False)
    rows = {row.candidate: row.status for row in runner.measure(job, settings)}
    assert rows["tilework tiled"] == rows["torch compile"] == "ok"
    assert rows["liger-kernel"] == rows["tilework triton"] == "missing"


@pytest.mark.untyped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [7, 2**11])
def test_the_default_is_what_runs(
    kind: str, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilework.norms import _row_norm

    problem = Case(kind, {"M": rows, "N": 1024})
    inputs = suite.inputs(problem, dtype, CPU)
    ran = []
    for module, attribute, name in (
        (_row_norm.torch, "forward", "torch"),
        (_row_norm.operators, "row_norm", "tiled"),
    ):
        original = getattr(module, attribute)

        def spy(*arguments, name=name, original=original):
            ran.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, attribute, spy)
    _ = suite._ours(problem, inputs, None)()
    names = set(ran)
    ours = (one for one in suite.SUITE.candidates if not (one.peer or one.devices))
    defaults = {one.name for one in ours if one.bind(problem, inputs).default}
    assert {f"tilework {name}" for name in names} == defaults
