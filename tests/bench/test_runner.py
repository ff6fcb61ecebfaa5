import dataclasses
import warnings

import pytest
import torch
from bench import tiny_suite

from tilework.bench import results, runner, timing
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
    assert (row.default, row.peer) == (True, False)
    assert row.kernel == "kernel of tilework square (aten::mul)"
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


class Clockwork:
    """Timings that are made up: of the candidates in seconds, of the limits in their work."""

    def __init__(self, seconds: dict[str, float], rates: tuple[float, ...] = (1e9, 1e6, 1e6)):
        self.seconds, self.rates, self.limits, self.now = seconds, rates, [], 0.0
        self.others: list[tuple[float, float]] = []

    def limits_of(self, *arguments: object, **options: object) -> list[timing.Limit]:
        self.asked = arguments, options
        kinds = (timing.PRODUCT, timing.COPY, timing.COPY)
        self.limits = [timing.Limit(kind, 10**6, lambda: None) for kind in kinds]
        return self.limits

    def alternate(
        self, runs: dict[str, object], *arguments: object, **options: object
    ) -> dict[str, timing.Timed]:
        self.now += 100.0
        seconds = dict(zip(runs, [1.0] * len(runs), strict=True)) | self.seconds
        for number, rate in enumerate(self.rates):
            seconds[f"limit {number}"] = 1e6 / rate
        return {
            name: timing.Timed([seconds[name]] * 2)
            if isinstance(seconds[name], float)
            else timing.Timed([], seconds[name])
            for name in runs
        }

    def run(self, monkeypatch: pytest.MonkeyPatch, job: Job, **options: object) -> dict[str, Row]:
        clock = self

        class Others:
            def __init__(self) -> None:
                self.begin = clock.now

            def cpus(self) -> float:
                return clock.now - self.begin

        monkeypatch.setattr(timing, "limits", self.limits_of)
        monkeypatch.setattr(timing, "alternate", self.alternate)
        monkeypatch.setattr(timing, "Others", Others)
        settings = dataclasses.replace(SETTINGS, **options)
        return {row.candidate: row for row in runner.measure(job, settings)}


MEASURED = ("tilework square", "torch eager", "peer inexact")


def test_the_fraction_of_the_limit_is_that_of_the_slower_resource(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 1e9 operations and 8000 bytes.
    for rates, fraction in (((1e10, 1e9, 1e9), 0.1), ((1e12, 1e3, 32e3), 0.25)):
        rows = Clockwork({}, rates).run(monkeypatch, JOB)
        for name in MEASURED:
            assert rows[name].fraction_of_limit == pytest.approx(fraction)
            assert rows[name].limits == {timing.PRODUCT: rates[0], timing.COPY: max(rates[1:])}


def test_a_limit_is_asked_for_what_the_case_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for products in (False, True):
        suite = dataclasses.replace(tiny_suite.SUITE, products=products)
        clock = Clockwork({})
        clock.run(monkeypatch, dataclasses.replace(JOB, suite=suite, dtype="bfloat16"))
        assert clock.asked == ((torch.bfloat16, CPU), {"products": products, "traffic": 4000})


def test_what_is_faster_than_its_limit_has_no_fraction_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = Clockwork({"torch eager": 0.5}, (1e9, 1e6, 1e6)).run(monkeypatch, JOB)
    assert rows["tilework square"].fraction_of_limit == 1
    assert rows["torch eager"].fraction_of_limit is None
    assert "of limit: faster than the limit that was measured (200%)" in rows["torch eager"].notes


def test_without_a_limit_times_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clockwork({})
    clock.limits_of = lambda *_, **__: [timing.Limit(timing.COPY, 1, lambda: None)]  # type: ignore[method-assign]
    clock.rates = ()
    clock.seconds["limit 0"] = MemoryError("full")  # type: ignore[assignment]
    row = clock.run(monkeypatch, JOB)["torch eager"]
    assert (row.status, row.median, row.limits) == (results.OK, 1.0, {})
    assert row.fraction_of_limit is None
    assert "of limit: MemoryError: full" in row.notes


def test_what_other_processes_took_reaches_every_row_and_spans_the_timing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = Clockwork({}).run(monkeypatch, JOB)
    for name, row in rows.items():
        assert row.others_cpus == (100.0 if name in MEASURED else None)


def test_what_fails_while_it_is_timed_shows_no_time_and_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner.memory, "in_fresh_process", lambda *_: 7)
    clock = Clockwork({"torch eager": MemoryError("full")})  # type: ignore[dict-item]
    rows = clock.run(monkeypatch, JOB, memory=True)
    failed = rows["torch eager"]
    assert (failed.status, failed.reason) == (results.FAILED, "MemoryError: full")
    times = (failed.median, failed.q1, failed.q3, failed.fraction_of_limit, failed.runs)
    assert times == (None, None, None, None, 0)
    assert failed.peak_bytes is None
    assert {name for name, row in rows.items() if row.peak_bytes == 7} == {
        "tilework square",
        "peer inexact",
    }


def test_memory_is_that_of_the_device_or_says_why_it_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unmeasured(*_: object) -> int:
        raise runner.memory.Unmeasured("nobody knows")

    monkeypatch.setattr(runner.memory, "in_fresh_process", unmeasured)
    monkeypatch.setattr(runner.memory, "on_gpu", lambda run, device: 11)
    rows = Clockwork({}).run(monkeypatch, JOB, memory=True)
    for name in MEASURED:
        assert rows[name].peak_bytes is None
        assert "memory: nobody knows" in rows[name].notes
    row = rows["torch eager"]
    step = runner.Step(dict, "")
    runner._record_memory(row, step, JOB, torch.device("cuda"))
    assert row.peak_bytes == 11


def test_warnings_of_a_candidate_are_in_its_notes_once_and_in_one_line() -> None:
    def build(case: Case, inputs: Inputs) -> runner.Step:
        def run() -> Results:
            for _ in range(2):
                warnings.warn("a slow path\nwas taken", UserWarning, stacklevel=1)
            return {"square": inputs["input"] ** 2}

        return runner.Step(run, "")

    noisy = dataclasses.replace(tiny_suite.SUITE.candidates[2], build=build)
    suite = dataclasses.replace(tiny_suite.SUITE, candidates=(noisy,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (row,) = runner.measure(dataclasses.replace(JOB, suite=suite), SETTINGS)
    assert row.status == results.OK
    assert [note for note in row.notes if "slow" in note or "taken" in note] == ["a slow path"]


def test_results_without_a_truth_are_refused() -> None:
    def less(case: Case, inputs: Inputs) -> Results:
        return {}

    suite = dataclasses.replace(tiny_suite.SUITE, truth=less)
    rows = list(runner.measure(dataclasses.replace(JOB, suite=suite), SETTINGS))
    assert results.OK not in {row.status for row in rows}
    assert "the results have shapes {'square': (1000,)}, the truth has {}" in rows[0].reason


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


def test_the_composition_is_held_to_half_of_its_digits(rows: dict[str, Row]) -> None:
    assert rows["torch eager"].allowed == {"square": torch.finfo(torch.float32).eps ** 0.5}


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
    growing = runner.plan(suites, CPU, growth=True)
    assert [job.case.sizes["n"] for job in growing] == [2**power for power in range(3, 11)]


def test_the_first_cases_of_all_suites_come_first() -> None:
    one = dataclasses.replace(tiny_suite.SUITE, module="x.one")
    jobs = runner.plan([one, tiny_suite.SUITE], CPU, dtypes=("float32", "float64"))
    ordered = runner.most_important_first(jobs)
    assert [(job.suite.name, job.case.sizes["n"], job.dtype) for job in ordered[:6]] == [
        ("one", 8, "float32"),
        ("one", 8, "float64"),
        ("tiny_suite", 8, "float32"),
        ("tiny_suite", 8, "float64"),
        ("one", 1000, "float32"),
        ("one", 1000, "float64"),
    ]
    assert len(ordered) == len(jobs)


def test_what_was_measured_with_the_same_software_is_known(rows: dict[str, Row]) -> None:
    there = {row.key: row for row in rows.values()}
    assert runner.measured(JOB, SETTINGS, there) == list(rows.values())
    ours = runner.measured(JOB, SETTINGS, there, lambda candidate: not candidate.peer)
    assert [row.candidate for row in ours] == ["tilework square", "tilework wrong"]

    square = rows["tilework square"]
    less = {key: row for key, row in there.items() if key != square.key}
    assert runner.measured(JOB, SETTINGS, less) is None
    other = dataclasses.replace(square, commit="elsewhere")
    assert runner.measured(JOB, SETTINGS, there | {square.key: other}) is None
    with_memory = dataclasses.replace(SETTINGS, memory=True)
    assert runner.measured(JOB, with_memory, there) is None
    noted = {key: dataclasses.replace(row, peak_bytes=1, notes=[]) for key, row in there.items()}
    assert runner.measured(JOB, with_memory, noted) is not None
    unknown = dataclasses.replace(square, notes=["memory: nobody knows"])
    assert runner.measured(JOB, with_memory, noted | {square.key: unknown}) is not None


@pytest.mark.parametrize("part", ["inputs", "truth"])
def test_without_inputs_or_truth_every_row_says_why(part: str) -> None:
    def fail(*arguments: object) -> Results:
        raise MemoryError("too large")

    suite = dataclasses.replace(tiny_suite.SUITE, **{part: fail})
    job = dataclasses.replace(JOB, suite=suite)
    rows = list(runner.measure(job, SETTINGS, lambda candidate: not candidate.peer))
    assert [row.candidate for row in rows] == ["tilework square", "tilework wrong"]
    assert {row.reason for row in rows} == {"nothing to check with: MemoryError: too large"}
    assert {row.status for row in rows} == {results.FAILED}


def test_results_may_be_compared_in_another_form_than_they_are_timed() -> None:
    suite = dataclasses.replace(
        tiny_suite.SUITE, compared=lambda found: {"square": found["square"] * 2}
    )
    rows = list(runner.measure(dataclasses.replace(JOB, suite=suite), SETTINGS))
    assert rows[0].errors["square"] == pytest.approx(1, rel=1e-3)


def test_a_failing_profiler_costs_a_note_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> list[str]:
        raise RuntimeError("no profiler")

    monkeypatch.setattr(runner.kernels, "names", fail)
    row = next(runner.measure(JOB, SETTINGS))
    assert (row.status, row.kernel) == (results.OK, "kernel of tilework square")
    assert "kernels: RuntimeError: no profiler" in row.notes


def test_a_device_after_an_invalid_access_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert not runner.answers(torch.device("cuda"))
    assert runner.answers(CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert runner.answers(torch.device("cuda"))
