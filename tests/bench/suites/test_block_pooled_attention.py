import pytest
import torch

from tilework.bench import accuracy, runner
from tilework.bench.suites import Case, Unavailable
from tilework.bench.suites import block_pooled_attention as suite

CPU = torch.device("cpu")
KINDS = list(suite.OPERATORS)


def case(kind: str, length: int = 128, block: int = 16) -> Case:
    return Case(kind, {"L": length, "H": 2, "E": 8, "B": block})


@pytest.mark.parametrize("rows", [40, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_the_softmax_of_all_scores(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "TRUTH_ROWS", rows)
    problem = case(kind)
    inputs = suite.inputs(problem, torch.float64, CPU)
    scores = inputs["query"] @ inputs["key"].mT / 8**0.5
    scores = scores.masked_fill(torch.ones(128, 128).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(inputs["lse"], scores.logsumexp(-1).float())
    weights = scores.softmax(-1)
    blocks = [
        weights[..., i : i + 16, j : j + 16] for i in range(0, 128, 16) for j in range(0, 128, 16)
    ]
    expected = {
        suite.MAX: torch.stack([one.amax((2, 3)) for one in blocks], -1).view(1, 2, 8, 8),
        suite.SUM: torch.stack([one.sum((2, 3)) for one in blocks], -1).view(1, 2, 8, 8),
        suite.MASS: weights.sum(2),
        suite.ENTROPY: -torch.xlogy(weights, weights).sum(3),
    }[kind]
    # The log-sum-exp is that of float32.
    torch.testing.assert_close(
        suite.truth(problem, inputs)["result"], expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_right_or_say_why_not(kind: str, dtype: str) -> None:
    problem = case(kind)
    inputs = suite.inputs(problem, getattr(torch, dtype), CPU)
    truth = suite.truth(problem, inputs)
    unavailable, default = set(), []
    for candidate in suite.SUITE.candidates:
        if candidate.name == "torch compile":
            continue
        try:
            step = candidate.bind(problem, inputs)
        except Unavailable:
            unavailable.add(candidate.name)
            continue
        errors = accuracy.errors(step.run(), truth)
        assert errors["result"] < 10 * torch.finfo(getattr(torch, dtype)).eps
        default += [candidate.name] * step.default
        if not candidate.peer:
            assert f"attention.{suite.OPERATORS[kind]} " in step.kernel
    dense = {"torch sdpa (dense forward)"}
    assert unavailable == {"tilework triton"} | (set() if kind == suite.SUM else dense)
    assert default == ["tilework tiled"]


def test_the_dense_forward_is_of_the_size_of_attention() -> None:
    dense = next(one for one in suite.SUITE.candidates if "dense" in one.name)
    problem = case(suite.SUM, block=32)
    with pytest.raises(Unavailable, match="with 4 blocks it is not of the size of attention"):
        dense.bind(problem, suite.inputs(problem, torch.float32, CPU))
    for device in ("cpu", "cuda"):
        sums = [one.sizes for one in suite.cases(device) if one.kind == suite.SUM]
        assert all(one["L"] == one["B"] * one["E"] for one in sums)


@pytest.mark.parametrize("length", [16, 128])
def test_costs_count_what_is_seen(length: int) -> None:
    visible = int(torch.ones(length, length).tril().sum())
    assert suite.flops(case(suite.MAX, length)) == 2 * 8 * 2 * visible
    elements = 2 * 2 * length * 8
    blocks = (length // 16) ** 2
    maps = 2 * 4 * (length + blocks)
    assert suite.traffic(case(suite.MAX, length), torch.bfloat16) == 2 * elements + maps
    assert suite.traffic(case(suite.MASS, length), torch.float32) == 4 * elements + 16 * length


def test_cases_start_with_the_yardstick() -> None:
    assert suite.cases("cpu")[0].name == "sum of blocks L=4096 H=4 E=64 B=64"
    assert [one.name for one in suite.cases("cuda")[:2]] == [
        "sum of blocks L=32768 H=32 E=128 B=256",
        "max of blocks L=32768 H=32 E=128 B=64",
    ]


@pytest.mark.untyped
def test_the_runner_refuses_a_map_that_is_wrong_by_a_percent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Some seconds: one of the candidates is compiled.
    job = runner.Job(suite.SUITE, case(suite.SUM), "float32")
    settings = runner.Settings(CPU, seconds=0, rounds=(2, 2), memory=False)
    rows = {row.candidate: row for row in runner.measure(job, settings)}
    names = ("tilework tiled", "torch eager (softmax)", "torch compile")
    assert {rows[name].status for name in (*names, "torch sdpa (dense forward)")} == {"ok"}

    right = suite.block_pooled_attention
    monkeypatch.setattr(suite, "block_pooled_attention", lambda *a, **o: 1.01 * right(*a, **o))
    rows = {row.candidate: row for row in runner.measure(job, settings)}
    assert rows["tilework tiled"].status == "refused"
    assert rows["torch eager (softmax)"].status == "ok"


def test_nothing_is_compiled_with_quick() -> None:
    (problem,) = (one for one in suite.cases("cpu") if one.quick)
    inputs = suite.inputs(problem, torch.float32, CPU)
    compiled = [one for one in suite.SUITE.candidates if "compile" in one.name]
    assert compiled
    for candidate in compiled:
        with pytest.raises(Unavailable, match="left out of --quick"):
            candidate.bind(problem, inputs)
