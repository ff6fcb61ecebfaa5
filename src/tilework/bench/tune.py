"""``tilework tune``: block sizes of a kernel by measurement, for the table beside the kernel.

The search starts at the table's own entry and changes one value at a time, to the next larger or
smaller one, as long as that helps beyond the measured spread. What does not compile or computes
something wrong is passed over.
"""

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from tilework.bench import accuracy, runner, suites, timing
from tilework.bench.suites import Case, Results, Suite

Entry = dict[str, int]
Report = Callable[[str], None]

ROUNDS = (5, 20)
SECONDS = 1.0  # for the comparison of two entries
OURS = "tilework triton"


@dataclass(frozen=True)
class Place:
    """Where an entry stands, which depends on the problem too."""

    arch: str
    dtype: torch.dtype
    case: Case


@dataclass(frozen=True)
class Kernel:
    """A kernel whose block sizes stand in a table.

    Attributes:
        suite: The suite that checks and times it; times include what runs before and after it.
        kind: The kind of that suite's cases.
        choices: The values to try for each part of an entry.
        current: The entry that the table has.
        use: Puts another entry there for a while.
        line: An entry as it is written in the table.
    """

    suite: str
    kind: str
    choices: Mapping[str, tuple[int, ...]]
    current: Callable[[Place], Entry]
    use: Callable[[Place, Entry], AbstractContextManager[Any]]
    line: Callable[[Place, Entry], str]


def _linear_cross_entropy(name: str, kind: str) -> Kernel:
    def table() -> Any:
        return getattr(importlib.import_module("tilework.losses._classes.linear.triton"), name)

    def current(place: Place) -> Entry:
        entry: Entry = table().choose(place.arch, place.dtype)._asdict()
        return entry

    def use(place: Place, entry: Entry) -> AbstractContextManager[Any]:
        override: AbstractContextManager[Any] = table().override(_config(entry))
        return override

    def line(place: Place, entry: Entry) -> str:
        from tilework import _triton

        where = _triton.Place(place.arch, place.dtype)
        return f"{name}: {table().line(where, _config(entry))}"

    def _config(entry: Entry) -> Any:
        from tilework._triton import Config

        return Config(**entry)

    choices = {
        "block_rows": (16, 32, 64, 128, 256),
        "block_columns": (16, 32, 64, 128, 256),
        "block_inner": (16, 32, 64, 128),
        "num_warps": (4, 8, 16),
        "num_stages": (1, 2, 3, 4, 5),
    }
    return Kernel("linear_cross_entropy", kind, choices, current, use, line)


def _block_sparse_attention(kernel: str, kind: str) -> Kernel:
    names = ("queries", "keys", "num_warps", "num_stages")

    def module() -> Any:
        return importlib.import_module("tilework.attention.block_sparse.triton")

    def features(place: Place) -> int:
        return max(16, 1 << (place.case.sizes["E"] - 1).bit_length())

    def current(place: Place) -> Entry:
        tile = module().choose_tile(kernel, place.arch, place.dtype, features(place))
        return dict(zip(names, tile, strict=True))

    def use(place: Place, entry: Entry) -> AbstractContextManager[Any]:
        tiles = {features(place): tuple(entry.values())}
        if place.dtype == torch.float32:
            return mock.patch.dict(module().FLOAT32, {kernel: tiles})
        return mock.patch.dict(module().TILES[kernel], {place.arch: tiles})

    def line(place: Place, entry: Entry) -> str:
        table = "FLOAT32" if place.dtype == torch.float32 else f'TILES "{place.arch}"'
        return f'{table} "{kernel}": {features(place)}: {tuple(entry.values())},'

    choices = {
        "queries": (16, 32, 64, 128),
        "keys": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3, 4),
    }
    return Kernel("block_sparse_attention", kind, choices, current, use, line)


KERNELS = {
    "linear_cross_entropy.forward": _linear_cross_entropy("FORWARD", "forward"),
    "linear_cross_entropy.backward": _linear_cross_entropy("BACKWARD", "forward+backward"),
    "block_sparse_attention.forward": _block_sparse_attention("forward", "forward"),
    "block_sparse_attention.query": _block_sparse_attention("query", "forward+backward"),
    "block_sparse_attention.key": _block_sparse_attention("key", "forward+backward"),
}


class Problem:
    """A case on a device, against which entries are checked and timed."""

    def __init__(self, kernel: Kernel, place: Place, device: torch.device) -> None:
        self.kernel, self.place, self.device = kernel, place, device
        self._suite: Suite = suites.discover()[kernel.suite]
        self._inputs = self._suite.inputs(place.case, place.dtype, device)
        self._truth = self._suite.truth(place.case, self._inputs)
        candidates = {one.name: one for one in self._suite.candidates}
        # Not bind, which keeps kernels from the interpreter.
        self._ours = candidates[OURS].build
        composition = candidates[self._suite.composition].build
        try:
            results = composition(place.case, self._inputs).run()
            self._yardstick = accuracy.errors(results, self._truth)
        except Exception:  # it may not fit in memory
            self._yardstick = {}

    def bind(self, entry: Entry) -> Callable[[], Results]:
        """The work by an entry of the table."""
        run = self._ours(self.place.case, self._inputs).run

        def with_entry() -> Results:
            with self.kernel.use(self.place, entry):
                return run()

        return with_entry

    def objection(self, entry: Entry) -> str | None:
        """Why an entry cannot be taken, if so: an error of the compiler, or a wrong result."""
        try:
            results = self.bind(entry)()
            errors = accuracy.errors(results, self._truth)
        except Exception as error:
            return runner.describe(error)
        allowed = accuracy.limits(results, self._yardstick, self.place.dtype, accuracy.OURS)
        return accuracy.objection(errors, allowed)

    def compare(self, one: Entry, other: Entry) -> tuple[timing.Quartiles, timing.Quartiles]:
        """The times of two entries, in turn.

        Raises:
            RuntimeError: One of them failed.
        """
        runs = {"one": self.bind(one), "other": self.bind(other)}
        timed = timing.alternate(runs, self.device, seconds=SECONDS, rounds=ROUNDS)
        for times in timed.values():
            if times.error is not None:
                raise RuntimeError(runner.describe(times.error))
        first, second = (timing.Quartiles.of(times.samples) for times in timed.values())
        return first, second

    def answers(self) -> bool:
        """Whether the device still computes."""
        return runner.answers(self.device)


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        best: The fastest entry, None if there is none that works.
        seconds: Its time, and that of the table's entry measured beside it.
        tried: How many entries were checked.
        skipped: Why some of them could not be taken.
        ended: Why the search ended.
    """

    best: Entry | None = None
    seconds: tuple[float, float] | None = None
    tried: int = 0
    skipped: list[tuple[Entry, str]] = field(default_factory=list)
    ended: str = ""


def neighbors(entry: Entry, choices: Mapping[str, tuple[int, ...]]) -> Iterator[Entry]:
    """The entries that differ in one value, which is the next larger or smaller choice."""
    for name, value in entry.items():
        larger = [choice for choice in choices[name] if choice > value][:1]
        smaller = [choice for choice in choices[name] if choice < value][-1:]
        for choice in larger + smaller:
            yield entry | {name: choice}


def search(problem: Problem, seconds: float, report: Report = lambda line: None) -> Outcome:
    """Look for a faster entry than that of the table until no neighbor is, or the time is over."""
    until = time.monotonic() + seconds
    outcome = Outcome()
    start = problem.kernel.current(problem.place)
    seen: list[Entry] = []

    def works(entry: Entry) -> bool:
        seen.append(entry)
        outcome.tried += 1
        reason = problem.objection(entry)
        if reason is not None:
            outcome.skipped.append((entry, reason))
            report(f"{describe(entry)}: skipped, {reason}")
        return reason is None

    def improve() -> bool:
        """Try the neighbors of the best entry until one is better."""
        for entry in neighbors(outcome.best or start, problem.kernel.choices):
            if entry in seen:
                continue
            if time.monotonic() >= until:
                outcome.ended = "the time is over"
                return False
            if not works(entry):
                if not problem.answers():
                    outcome.ended = "the device does not answer any more"
                    return False
                continue
            if outcome.best is None:
                outcome.best = entry
                return True
            try:
                best, this = problem.compare(outcome.best, entry)
            except RuntimeError as error:
                outcome.skipped.append((entry, str(error)))
                continue
            spread = (best.q3 - best.q1) + (this.q3 - this.q1)
            better = best.median - this.median > spread
            report(
                f"{describe(entry)}: {this.median * 1e3:.4g} ms, best so far "
                f"{best.median * 1e3:.4g} ms"
            )
            if better:
                outcome.best = entry
                return True
        outcome.ended = "no neighbor of the best entry is faster"
        return False

    if works(start):
        outcome.best = start
    while improve():
        pass
    if outcome.best is not None and start not in [entry for entry, _ in outcome.skipped]:
        try:
            now, best = problem.compare(start, outcome.best)
        except RuntimeError as error:
            report(f"{describe(outcome.best)}: not compared with the table's entry: {error}")
        else:
            outcome.seconds = best.median, now.median
    return outcome


def describe(entry: Entry) -> str:
    """An entry in one line."""
    return " ".join(f"{name}={value}" for name, value in entry.items())
