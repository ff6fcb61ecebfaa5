"""The search with a clock that the tests wind, and entries that Triton's interpreter runs."""

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tilework.bench import timing, tune
from tilework.bench.suites import Case
from tilework.bench.tune import Entry, Outcome, Place

pytestmark = pytest.mark.untyped  # kernels run

CPU = torch.device("cpu")
CHOICES = {"rows": (16, 32, 64, 128), "warps": (2, 4, 8)}
START = {"rows": 32, "warps": 2}
SIZES = {
    "linear_cross_entropy": {"N": 20, "D": 24, "V": 100},
    "block_sparse_attention": {"L": 128, "H": 2, "E": 16, "K": 1},
}


class Toy:
    """A problem whose times are a function of the entry."""

    def __init__(self, milliseconds: Callable[[Entry], float], spread: float = 0.0) -> None:
        self.kernel: Any = SimpleNamespace(choices=CHOICES, current=lambda place: dict(START))
        self.place = None
        self.milliseconds, self.spread = milliseconds, spread
        self.wrong: dict[str, str] = {}
        self.alive = True
        self.checked: list[Entry] = []

    def objection(self, entry: Entry) -> str | None:
        self.checked.append(entry)
        return self.wrong.get(tune.describe(entry))

    def compare(self, one: Entry, other: Entry) -> tuple[timing.Quartiles, timing.Quartiles]:
        first, second = (self.milliseconds(entry) / 1e3 for entry in (one, other))
        half = self.spread / 2e3
        return tuple(timing.Quartiles(m - half, m, m + half) for m in (first, second))  # type: ignore[return-value]

    def answers(self) -> bool:
        return self.alive


def search(toy: Toy, seconds: float = 100.0, **options: Any) -> Outcome:
    return tune.search(toy, seconds, **options)  # type: ignore[arg-type]


def distance(entry: Entry) -> float:
    """Least at 128 rows and 8 warps."""
    return 10 - entry["rows"] / 32 - entry["warps"] / 2


def test_neighbors_differ_by_one_step_in_one_value() -> None:
    assert list(tune.neighbors(START, CHOICES)) == [
        {"rows": 64, "warps": 2},
        {"rows": 16, "warps": 2},
        {"rows": 32, "warps": 4},
    ]
    between = {"rows": 48, "warps": 8}
    assert {one["rows"] for one in tune.neighbors(between, CHOICES)} == {32, 48, 64}


def test_the_search_climbs_to_the_best_entry_and_tries_none_twice() -> None:
    toy = Toy(distance)
    lines: list[str] = []
    outcome = search(toy, report=lines.append)
    assert outcome.best == {"rows": 128, "warps": 8}
    assert outcome.ended == "no neighbor of the best entry is faster"
    assert outcome.seconds == pytest.approx((2e-3, 8e-3))
    assert len(toy.checked) == len({tune.describe(entry) for entry in toy.checked})
    assert outcome.tried == len(toy.checked)
    assert any("rows=64 warps=2: 7 ms, best so far 8 ms" in line for line in lines)


def test_a_gain_within_the_spread_is_none() -> None:
    assert search(Toy(distance, spread=10.0)).best == START


def test_what_is_wrong_or_does_not_compile_is_skipped_with_the_reason() -> None:
    toy = Toy(distance)
    toy.wrong = {"rows=128 warps=8": "out of shared memory"}
    lines: list[str] = []
    outcome = search(toy, report=lines.append)
    assert outcome.best in ({"rows": 128, "warps": 4}, {"rows": 64, "warps": 8})
    assert ({"rows": 128, "warps": 8}, "out of shared memory") in outcome.skipped
    assert "rows=128 warps=8: skipped, out of shared memory" in lines


def test_a_table_whose_own_entry_fails_gets_another() -> None:
    toy = Toy(distance)
    toy.wrong = {"rows=32 warps=2": "it does not compile"}
    outcome = search(toy)
    assert outcome.best == {"rows": 128, "warps": 8}
    assert outcome.seconds is None
    toy.wrong = {tune.describe(entry): "no" for entry in (START, *tune.neighbors(START, CHOICES))}
    assert search(toy).best is None


def test_an_entry_that_fails_while_it_is_timed_is_skipped() -> None:
    def fail(entry: Entry) -> float:
        if entry["rows"] == 64:
            raise RuntimeError("too late")
        return distance(entry)

    outcome = search(Toy(fail))
    assert outcome.best == {"rows": 32, "warps": 8}
    assert ({"rows": 64, "warps": 2}, "too late") in outcome.skipped


def test_the_search_ends_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(tune.time, "monotonic", lambda: float(next(now)))
    outcome = search(Toy(distance), seconds=2.5)
    assert outcome.ended == "the time is over"
    assert outcome.tried == 3
    assert outcome.best == {"rows": 128, "warps": 2}


def test_the_search_ends_with_the_device() -> None:
    def measure(entry: Entry) -> float:
        if {"rows": 128, "warps": 2} in toy.checked:
            raise RuntimeError("the device is lost")
        return distance(entry)

    toy, lines = Toy(measure), []
    toy.wrong = {"rows=128 warps=2": "an illegal memory access"}
    toy.alive = False
    outcome = search(toy, report=lines.append)
    assert outcome.ended == "the device does not answer any more"
    assert outcome.best == {"rows": 64, "warps": 2}
    assert outcome.seconds is None
    assert lines[-1] == ("rows=64 warps=2: not compared with the table's entry: the device is lost")


def place(name: str, dtype: torch.dtype = torch.float32, arch: str = "interpreter") -> Place:
    kernel = tune.KERNELS[name]
    return Place(arch, dtype, Case(kernel.kind, SIZES[kernel.suite]))


triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@triton
@pytest.mark.parametrize("name", tune.KERNELS)
def test_entries_are_checked_and_timed_by_running_the_kernel(name: str) -> None:
    kernel = tune.KERNELS[name]
    problem = tune.Problem(kernel, place(name), CPU)
    start = kernel.current(problem.place)
    assert set(start) == set(kernel.choices)
    assert problem.objection(start) is None
    smaller = start | {next(iter(start)): 16}
    with kernel.use(problem.place, smaller):
        assert kernel.current(problem.place) == smaller
    assert kernel.current(problem.place) == start
    assert problem.objection(smaller) is None
    # A block that is no power of 2 does not compile.
    assert "Error" in problem.objection(start | {next(iter(start)): 24})


@triton
def test_a_wrong_result_is_objected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "linear_cross_entropy.forward"
    problem = tune.Problem(tune.KERNELS[name], place(name), CPU)
    problem._truth["loss"] *= 1.001
    assert "the error of loss" in problem.objection(problem.kernel.current(problem.place))


@triton
def test_two_entries_are_compared_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "linear_cross_entropy.forward"
    problem = tune.Problem(tune.KERNELS[name], place(name), CPU)
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    monkeypatch.setattr(tune, "ROUNDS", (2, 2))
    start = problem.kernel.current(problem.place)
    for quartiles in problem.compare(start, start | {"block_rows": 32}):
        assert 0 < quartiles.q1 <= quartiles.median
    with pytest.raises(RuntimeError, match="Error"):
        problem.compare(start, start | {"block_rows": 24})


@triton
@pytest.mark.parametrize(
    ("name", "dtype", "arch", "line"),
    [
        (
            "linear_cross_entropy.forward",
            torch.bfloat16,
            "sm_90",
            'FORWARD: "sm_90": Config(block_rows=1, block_columns=2, block_inner=3, '
            "num_warps=4, num_stages=5),",
        ),
        (
            "linear_cross_entropy.backward",
            torch.float32,
            "sm_90",
            'BACKWARD: "sm_90 float32": Config(block_rows=1, block_columns=2, block_inner=3, '
            "num_warps=4, num_stages=5),",
        ),
        (
            "block_sparse_attention.key",
            torch.float16,
            "sm_80",
            'TILES "sm_80" "key": 16: (1, 2, 3, 4),',
        ),
        (
            "block_sparse_attention.forward",
            torch.float32,
            "sm_80",
            'FLOAT32 "forward": 16: (1, 2, 3, 4),',
        ),
    ],
)
def test_the_entry_is_printed_as_it_is_written(
    name: str, dtype: torch.dtype, arch: str, line: str
) -> None:
    kernel = tune.KERNELS[name]
    entry = dict(zip(kernel.choices, range(1, 6), strict=False))
    where = place(name, dtype, arch)
    assert kernel.line(where, entry) == line
    with kernel.use(where, entry):
        assert kernel.current(where) == entry


@pytest.mark.gpu
@pytest.mark.parametrize("name", tune.KERNELS)
def test_a_search_on_a_gpu(name: str) -> None:
    from tilework import _triton

    device = torch.device("cuda")
    where = place(name, torch.bfloat16, _triton.architecture(device))
    outcome = tune.search(tune.Problem(tune.KERNELS[name], where, device), 5)
    assert outcome.best is not None, outcome.skipped
