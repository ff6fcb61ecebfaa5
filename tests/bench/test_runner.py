import dataclasses

import pytest
import torch
from bench import tiny_suite

from tilework.bench import results, runner
from tilework.bench.results import Row
from tilework.bench.runner import Job, Settings
from tilework.bench.suites import Case, Inputs, Results

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, seconds=0.01, rounds=(2, 4), memory=False)
JOB = Job(tiny_suite.SUITE, tiny_suite.cases("cpu")[1], "float32")


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.candidate: row for row in runner.measure(JOB, SETTINGS)}


def test_every_candidate_has_one_row_in_the_order_of_the_suite(rows: dict[str, Row]) -> None:
    assert list(rows) == [candidate.name for candidate in tiny_suite.SUITE.candidates]


def test_a_right_candidate_is_measured(rows: dict[str, Row]) -> None:
    row = rows["tilework square"]
    assert (row.status, row.reason) == (results.OK, None)
    assert row.q1 <= row.median <= row.q3
    assert 2 <= row.runs <= 4
    assert row.others_cpus is None or row.others_cpus >= 0
    assert 0 < row.errors["square"] <= row.allowed["square"] < 3e-7
    assert (row.default, row.peer, row.kernel) == (True, False, "kernel of tilework square")
    assert row.extra == {"kept": 0.25}
    assert (row.sizes, row.dtype, row.device, row.case) == (
        {"n": 1000},
        "float32",
        "cpu",
        JOB.case.name,
    )
    assert row.versions["torch"] == torch.__version__
    assert row.threads == torch.get_num_threads()
    assert row.timestamp.endswith("+00:00")


def test_the_fraction_of_the_limit_is_that_of_the_slower_resource(rows: dict[str, Row]) -> None:
    row = rows["tilework square"]
    by_products = 1e9 / row.limits["matmul_flops_per_second"]
    by_traffic = 8000 / row.limits["copy_bytes_per_second"]
    assert by_products > by_traffic
    assert row.fraction_of_limit == pytest.approx(by_products / row.median)


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("tilework wrong", results.REFUSED, "the error of square is 0.016, at most"),
        ("peer nan", results.REFUSED, "the error of square is nan"),
        ("peer short", results.FAILED, "ValueError: the results have shapes"),
        ("peer broken", results.FAILED, "RuntimeError: out of luck"),
        ("peer unavailable", results.MISSING, "it needs a full moon"),
        ("peer absent", results.MISSING, "not installed: pip install no-such-package"),
        ("peer elsewhere", results.MISSING, "it runs on no-such-device, not on cpu"),
    ],
)
def test_whatever_is_not_measured_says_why(
    rows: dict[str, Row], name: str, status: str, reason: str
) -> None:
    row = rows[name]
    assert row.status == status
    assert reason in row.reason
    assert "\n" not in row.reason
    assert (row.median, row.runs, row.peak_bytes) == (None, 0, None)


def test_peers_may_err_more_than_we_may(rows: dict[str, Row]) -> None:
    inexact = rows["peer inexact"]
    assert inexact.status == results.OK
    assert inexact.errors["square"] > rows["tilework square"].allowed["square"]


def test_a_wrong_composition_is_refused_and_is_no_yardstick() -> None:
    def wrong_truth(case: Case, inputs: Inputs) -> Results:
        return {"square": inputs["input"].double().pow(2) * 1.1}

    suite = dataclasses.replace(tiny_suite.SUITE, truth=wrong_truth)
    rows = list(runner.measure(dataclasses.replace(JOB, suite=suite), SETTINGS))
    assert {row.status for row in rows if row.errors} == {results.REFUSED}


def test_only_the_chosen_are_measured_but_the_yardstick_is_kept() -> None:
    rows = list(runner.measure(JOB, SETTINGS, lambda candidate: not candidate.peer))
    assert [row.candidate for row in rows] == ["tilework square", "tilework wrong"]
    assert [row.status for row in rows] == [results.OK, results.REFUSED]


def test_an_error_while_timing_fails_the_row_alone() -> None:
    def build(case: Case, inputs: Inputs) -> runner.Step:
        calls = 0

        def run() -> Results:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise MemoryError("full")
            return {"square": inputs["input"] ** 2}

        return runner.Step(run, "")

    fragile = dataclasses.replace(tiny_suite.SUITE.candidates[0], name="fragile", build=build)
    suite = dataclasses.replace(
        tiny_suite.SUITE, candidates=(fragile, *tiny_suite.SUITE.candidates[:3])
    )
    rows = list(runner.measure(dataclasses.replace(JOB, suite=suite), SETTINGS))
    assert [row.status for row in rows] == ["failed", "ok", "refused", "ok"]
    assert rows[0].reason == "MemoryError: full"


def test_progress_goes_from_nothing_to_all() -> None:
    parts: list[float] = []
    list(runner.measure(JOB, SETTINGS, progress=lambda what, part: parts.append(part)))
    assert parts == sorted(parts)
    assert (parts[0], parts[-1]) == (0, 1)


def test_the_plan() -> None:
    suites = [tiny_suite.SUITE]
    assert [job.name for job in runner.plan(suites, CPU, quick=True)] == [
        "tiny_suite square n=16 float32",
        "tiny_suite square n=16 bfloat16",
    ]
    assert len(runner.plan(suites, CPU)) == 4
    assert {job.dtype for job in runner.plan(suites, CPU, dtypes=("float16",))} == {"float16"}
    assert [job.case.sizes["n"] for job in runner.plan(suites, CPU, pattern="n=8")] == [8, 8]
    assert runner.plan(suites, CPU, pattern="no such case") == []
