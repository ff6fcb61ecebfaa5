"""Runs the cases of the suites: check against float64, time in turn, measure memory, make rows."""

import datetime
import gc
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from tilework.bench import accuracy, kernels, memory, results, timing
from tilework.bench.results import FAILED, MISSING, REFUSED, Row
from tilework.bench.suites import Candidate, Case, Inputs, Results, Step, Suite, Unavailable

Progress = Callable[[str, float], None]

# How the work of a case divides, for the display of the time left.
CHECKING, TIMING, MEMORY = 0.3, 0.5, 0.2


@dataclass(frozen=True)
class Job:
    """A case in one dtype."""

    suite: Suite
    case: Case
    dtype: str

    @property
    def name(self) -> str:
        """The job in one line."""
        return f"{self.suite.name} {self.case.name} {self.dtype}"


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    device: torch.device
    seconds: float = 10.0  # of timing, for each case
    rounds: tuple[int, int] = (5, 50)
    memory: bool = True


@dataclass
class _Entry:
    """A candidate on its way through a case."""

    candidate: Candidate
    row: Row
    step: Step | None = None
    errors: dict[str, float] = field(default_factory=dict)

    def drop(self, status: str, reason: str) -> None:
        self.step = None
        self.row.status, self.row.reason = status, reason


def plan(
    suites: Iterable[Suite],
    device: torch.device,
    *,
    dtypes: tuple[str, ...] = (),
    quick: bool = False,
    growth: bool = False,
    pattern: str = "",
) -> list[Job]:
    """The jobs: the cases of the suites whose name contains the pattern, in each dtype.

    Args:
        suites: What to run.
        device: Chooses the cases.
        dtypes: In place of each case's own.
        quick: Take the quick cases instead of the full ones.
        growth: Take the cases of growing work instead.
        pattern: A part of the case's name.
    """
    jobs = [
        Job(suite, case, dtype)
        for suite in suites
        for case in (_growing(suite) if growth else suite.cases(device.type))
        if case.quick == quick and pattern in case.name
        for dtype in dtypes or case.dtypes
    ]
    return list({(job.suite.name, job.case.name, job.dtype): job for job in jobs}.values())


def _growing(suite: Suite) -> list[Case]:
    return [case for growth in suite.growth for case in growth.cases]


def most_important_first(jobs: Iterable[Job]) -> list[Job]:
    """The first cases of all suites, then the second ones, and so on."""
    cases: dict[str, list[Case]] = {}
    ranked = []
    for job in jobs:
        seen = cases.setdefault(job.suite.name, [])
        if job.case not in seen:
            seen.append(job.case)
        ranked.append((seen.index(job.case), job))
    return [job for _, job in sorted(ranked, key=lambda pair: pair[0])]


def measured(
    job: Job,
    settings: Settings,
    rows: Mapping[results.Key, Row],
    chosen: Callable[[Candidate], bool] = lambda candidate: True,
) -> list[Row] | None:
    """The rows that a job would measure again with the same software, if all of them are there."""
    found = []
    for candidate in _candidates(job):
        if not chosen(candidate):
            continue
        expected = _row(job, candidate, settings.device)
        row = rows.get(expected.key)
        if row is None or not results.same_origin(row, expected):
            return None
        with_memory = row.peak_bytes is not None or any("memory" in note for note in row.notes)
        if row.status == results.OK and settings.memory and not with_memory:
            return None
        found.append(row)
    return found


def _candidates(job: Job) -> Collection[Candidate]:
    return [one for one in job.suite.candidates if not one.dtypes or job.dtype in one.dtypes]


def measure(
    job: Job,
    settings: Settings,
    chosen: Callable[[Candidate], bool] = lambda candidate: True,
    progress: Progress = lambda what, fraction: None,
) -> Iterator[Row]:
    """Measure one job and yield a row for each candidate that was chosen.

    Args:
        job: What to measure.
        settings: How.
        chosen: Which candidates take part. The composition is always run, as the yardstick.
        progress: Is told what is done now, and which part of the job is done.
    """
    suite, case, device = job.suite, job.case, settings.device
    dtype = getattr(torch, job.dtype)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # compiled code of earlier cases counts towards its limit
    progress(f"{job.name}: truth", 0.0)
    try:
        inputs = suite.inputs(case, dtype, device)
        truth = suite.truth(case, inputs)
    except Exception as error:
        for candidate in filter(chosen, _candidates(job)):
            row = _row(job, candidate, device)
            row.status, row.reason = FAILED, f"nothing to check with: {describe(error)}"
            yield row
        progress(job.name, 1.0)
        return

    # The yardstick first; the table keeps the suite's order.
    entries = {one.name: _Entry(one, _row(job, one, device)) for one in _candidates(job)}
    composition = entries[suite.composition]
    rest = [one for one in entries.values() if one is not composition and chosen(one.candidate)]
    for number, entry in enumerate([composition, *rest]):
        progress(f"{job.name}: checking {entry.candidate.name}", CHECKING * number / len(entries))
        _check(entry, job, inputs, truth, composition)
        if entry.step is not None and chosen(entry.candidate):
            _name_kernels(entry.row, entry.step, device)
    del truth
    entries = {name: entry for name, entry in entries.items() if chosen(entry.candidate)}

    ready = {name: entry.step for name, entry in entries.items() if entry.step is not None}
    limits = (
        timing.limits(dtype, device, products=suite.products, traffic=suite.traffic(case, dtype))
        if ready
        else []
    )
    others = timing.Others()
    timed = timing.alternate(
        {name: step.run for name, step in ready.items()}
        | {f"limit {number}": limit.run for number, limit in enumerate(limits)},
        device,
        seconds=settings.seconds,
        rounds=settings.rounds,
        progress=lambda part: progress(f"{job.name}: timing", CHECKING + TIMING * part),
    )
    busy = others.cpus()
    bounds = [timed.pop(f"limit {number}") for number in range(len(limits))]
    try:
        rates, no_rates = timing.rates(limits, bounds), None
    except Exception as error:
        rates, no_rates = {}, f"of limit: {describe(error)}"
    for name, times in timed.items():
        if times.error is not None:
            entries[name].drop(FAILED, describe(times.error))
        else:
            _record_time(entries[name].row, job, times.samples, rates)
            entries[name].row.others_cpus = busy
            if no_rates is not None:
                entries[name].row.notes.append(no_rates)

    for number, entry in enumerate(entries.values()):
        done = CHECKING + TIMING + MEMORY * number / len(entries)
        progress(f"{job.name}: memory of {entry.candidate.name}", done)
        if settings.memory and entry.step is not None:
            _record_memory(entry.row, entry.step, job, device)
        yield entry.row
    progress(job.name, 1.0)


def _row(job: Job, candidate: Candidate, device: torch.device) -> Row:
    return Row(
        suite=job.suite.name,
        case=job.case.name,
        kind=job.case.kind,
        sizes=dict(job.case.sizes),
        dtype=job.dtype,
        device=device.type,
        device_name=results.device_name(device),
        candidate=candidate.name,
        peer=candidate.peer,
        flops=job.suite.flops(job.case),
        traffic_bytes=job.suite.traffic(job.case, getattr(torch, job.dtype)),
        versions=results.versions()
        | (
            {candidate.distribution: results.version(candidate.distribution)}
            if candidate.distribution
            else {}
        ),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        commit=results.commit(),
        timestamp=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _check(entry: _Entry, job: Job, inputs: Inputs, truth: Results, composition: _Entry) -> None:
    """Run the candidate once, and keep its step if the numbers are right."""
    dtype, row = getattr(torch, job.dtype), entry.row
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            step = entry.candidate.bind(job.case, inputs)
            found = step.run()
            found = job.suite.compared(found)
            errors = accuracy.errors(found, truth)
        except Unavailable as reason:
            return entry.drop(MISSING, str(reason))
        except ImportError as error:
            return entry.drop(MISSING, describe(error))
        except Exception as error:
            return entry.drop(FAILED, describe(error))
        finally:
            row.notes = sorted({str(one.message).strip().partition("\n")[0] for one in caught})
    row.kernel, row.default, row.extra = step.kernel, step.default, dict(step.facts)
    entry.errors = errors
    row.errors = dict(errors)
    if entry is composition:
        row.allowed = accuracy.composition_limits(found, dtype)
    else:
        yardstick = composition.errors if composition.step is not None else {}
        rule = accuracy.PEER if entry.candidate.peer else accuracy.OURS
        row.allowed = accuracy.limits(found, yardstick, dtype, rule)
    objection = accuracy.objection(errors, row.allowed)
    if objection is not None:
        return entry.drop(REFUSED, objection)
    entry.step = step


def _name_kernels(row: Row, step: Step, device: torch.device) -> None:
    try:
        found = kernels.names(step.run, device)
    except Exception as error:
        row.notes.append(f"kernels: {describe(error)}")
        return
    row.kernel = f"{step.kernel} ({', '.join(found)})"


def _record_time(row: Row, job: Job, samples: list[float], rates: dict[str, float]) -> None:
    quartiles = timing.Quartiles.of(samples)
    row.q1, row.median, row.q3 = quartiles.q1, quartiles.median, quartiles.q3
    row.runs = len(samples)
    row.limits = rates
    if not rates:
        return
    traffic = job.suite.traffic(job.case, getattr(torch, job.dtype))
    least = max(job.suite.flops(job.case) / rates[timing.PRODUCT], traffic / rates[timing.COPY])
    fraction = least / row.median
    if fraction > 1:
        row.notes.append(f"of limit: faster than the limit that was measured ({fraction:.0%})")
    else:
        row.fraction_of_limit = fraction


def _record_memory(row: Row, step: Step, job: Job, device: torch.device) -> None:
    try:
        if device.type == "cuda":
            row.peak_bytes = memory.on_gpu(step.run, device)
        else:
            row.peak_bytes = memory.in_fresh_process(job.suite, job.case, job.dtype, row.candidate)
    except memory.Unmeasured as reason:
        row.notes.append(f"memory: {reason}")


def answers(device: torch.device) -> bool:
    """Whether a device still computes: after an invalid access, a GPU does not in this process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
    return True


def describe(error: Exception) -> str:
    """An error in one line."""
    gc.collect()  # the traceback held the tensors of a failed run
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
