"""The search with a clock that the tests wind, and entries that Triton's interpreter runs."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import tilework
from tilework.bench import timing, tune
from tilework.bench.suites import Case
from tilework.bench.tune import Entry, Outcome

pytestmark = pytest.mark.untyped  # kernels run

CPU = torch.device("cpu")
CHOICES = {"rows": (16, 32, 64, 128), "warps": (2, 4, 8)}
START = {"rows": 32, "warps": 2}
SIZES = {
    "linear_cross_entropy": {"N": 20, "D": 24, "V": 100},
    "linear_kl_div": {"N": 20, "D": 24, "E": 18, "V": 100},
    "norms": {"M": 20, "N": 8},
    "block_sparse_attention": {"L": 128, "H": 2, "E": 16, "K": 1},
    "block_sparse_decode": {"B": 2, "S": 256, "H": 4, "G": 2, "E": 16, "K": 3},
    "block_pooled_attention": {"L": 64, "H": 2, "E": 16, "B": 16},
    "losses": {"N": 20, "C": 100},
    "optim": {"T": 3, "E": 1000},
}
# No kernel takes blocks that are no power of 2. Those of norms follow from limits, and others are
# at most what a small problem has.
ODD = {
    "norms.forward": {"short": 24},
    "norms.backward": {"held": 1, "long": 56},
    "block_sparse_decode.one": {"keys": 24},
    "block_pooled_attention.pool": {"queries": 12},
}


class Toy:
    """A problem whose times are a function of the entry."""

    def __init__(self, milliseconds: Callable[[Entry], float], spread: float = 0.0) -> None:
        self.choices, self.start = CHOICES, dict(START)
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


def problem(
    name: str, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> tune.Problem:
    kernel = tune.KERNELS[name]
    return tune.Problem(kernel, Case(kernel.kind, SIZES[kernel.suite]), dtype, device)


triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@triton
@pytest.mark.parametrize(
    "name", [name for name, one in tune.KERNELS.items() if one.candidate != "tilework"]
)
def test_entries_are_checked_and_timed_by_running_the_kernel(name: str) -> None:
    one, table = problem(name), tune.KERNELS[name].tuned()
    start = one.start
    assert one.place.arch == "interpreter"
    assert tuple(start.values()) == table.choose(*one.place)
    assert one.objection(start) is None
    first = next(iter(start))
    smaller = start | {first: 16}
    with table.asked() as places:
        assert one.objection(smaller) is None
    assert one.place in places
    assert tuple(start.values()) == table.choose(*one.place)
    reason = one.objection(start | ODD.get(name, {first: 24}))
    assert reason is not None
    assert "Error" in reason


@triton
def test_a_wrong_result_is_objected_to() -> None:
    one = problem("linear_cross_entropy.forward")
    one._truth["loss"] *= 1.001
    assert "the error of loss" in one.objection(one.start)


@triton
def test_two_entries_are_compared_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    one = problem("linear_cross_entropy.forward")
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    monkeypatch.setattr(tune, "ROUNDS", (2, 2))
    for quartiles in one.compare(one.start, one.start | {"block_rows": 32}):
        assert 0 < quartiles.q1 <= quartiles.median
    with pytest.raises(RuntimeError, match="Error"):
        one.compare(one.start, one.start | {"block_rows": 24})


@triton
def test_a_case_that_does_not_run_the_kernel() -> None:
    kernel = replace(tune.KERNELS["linear_cross_entropy.forward"], kind="forward+backward")
    kernel = replace(kernel, table="FORWARD_MORE")
    case = Case(kernel.kind, SIZES[kernel.suite])
    with pytest.raises(ValueError, match=r"does not run for forward.backward N=20 .*: it asks for"):
        tune.Problem(kernel, case, torch.float32, CPU)


@triton
def test_the_entry_is_printed_as_it_is_written() -> None:
    from tilework._triton import Place

    heads, tiles = (
        tune.KERNELS[name]
        for name in ("linear_cross_entropy.backward", "block_sparse_attention.key")
    )
    config = {
        "block_rows": 1,
        "block_columns": 2,
        "block_inner": 3,
        "num_warps": 4,
        "num_stages": 5,
    }
    assert heads.line(Place("sm_90", torch.float32), config) == (
        'BACKWARD: "sm_90 float32": Config(block_rows=1, block_columns=2, block_inner=3, '
        "num_warps=4, num_stages=5),"
    )
    tile = {"queries": 1, "keys": 2, "num_warps": 3, "num_stages": 4}
    assert tiles.line(Place("sm_90", torch.bfloat16, 128), tile) == (
        'TILES.key: "sm_90": {64: Tile(queries=64, keys=64, num_warps=8, num_stages=2), '
        "128: Tile(queries=1, keys=2, num_warps=3, num_stages=4), "
        "256: Tile(queries=16, keys=16, num_warps=4, num_stages=1)},"
    )


# No suite has a case of moments, of rows side by side, of gradients through attention's map, of
# several query tokens of a sequence, or of a layer that is called by an implementation's name.
UNSERVED = {
    "losses._classes.linear.triton.statistics: FORWARD_MORE",
    "losses._classes.logits.triton: APART",
    "attention._attention_map.triton: TILES.query",
    "attention._attention_map.triton: TILES.key",
    "attention.block_sparse_decode.triton: SEVERAL",
    "quant.products.packed_linear.triton: DECODE",
    "quant.products.packed_linear.triton: GRADIENT",
    "quant.products.packed_linear.triton: PREFILL",
}


@triton
def test_every_table_is_served() -> None:
    from tilework._triton import Tuned

    tables = {}
    for info in pkgutil.walk_packages(tilework.__path__, "tilework."):
        if "triton" in info.name.split("."):
            for name, value in vars(importlib.import_module(info.name)).items():
                keyed = value if isinstance(value, dict) else {"": value}
                for key, table in keyed.items():
                    if isinstance(table, Tuned):
                        path = info.name.removeprefix("tilework.")
                        tables[f"{path}: {name}{'.' * bool(key)}{key}"] = table
    served = {f"{kernel.module}: {kernel.table}" for kernel in tune.KERNELS.values()}
    assert served | UNSERVED <= set(tables)
    known = {id(tables[name]) for name in served | UNSERVED}  # a table may be imported elsewhere
    left = [name for name, table in tables.items() if id(table) not in known]
    assert not left, "neither in KERNELS of bench/tune.py nor in UNSERVED"


@pytest.mark.gpu
@pytest.mark.parametrize("name", tune.KERNELS)
def test_a_search_on_a_gpu(name: str) -> None:
    outcome = tune.search(problem(name, torch.bfloat16, torch.device("cuda")), 5)
    assert outcome.best is not None, outcome.skipped
