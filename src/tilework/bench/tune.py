"""``tilework tune``: block sizes of a kernel by measurement, for the table beside the kernel.

The search starts at the table's own entry and changes one value at a time, to the next larger or
smaller one, as long as that helps beyond the measured spread. What does not compile or computes
something wrong is passed over.
"""

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tilework.bench import accuracy, runner, suites, timing
from tilework.bench.suites import Case, Results, Suite

if TYPE_CHECKING:
    from tilework._triton import Place, Tuned

Entry = dict[str, int]
Report = Callable[[str], None]

ROUNDS = (5, 20)
SECONDS = 1.0  # for the comparison of two entries
# Values that are worth a trial; of what is not here, powers of 2.
CHOICES = {"num_warps": (1, 2, 4, 8, 16), "num_stages": (1, 2, 3, 4, 5)}
SIZES = tuple(2**power for power in range(4, 17))


@dataclass(frozen=True)
class Kernel:
    """A kernel whose block sizes stand in a table.

    Attributes:
        module: The module of the table.
        table: The table's name there; for one of several in a mapping, with a dot and its key.
        suite: The suite that checks and times it; times include what runs before and after it.
        kind: The kind of that suite's cases.
        candidate: The suite's candidate that runs it.
    """

    module: str
    table: str
    suite: str
    kind: str
    candidate: str = "tilework triton"

    def tuned(self) -> "Tuned[Any]":
        """The table."""
        name, _, key = self.table.partition(".")
        found = getattr(importlib.import_module(f"tilework.{self.module}"), name)
        table: Tuned[Any] = found[key] if key else found
        return table

    def line(self, place: "Place", entry: Entry) -> str:
        """An entry as it is written in the table."""
        table = self.tuned()
        return f"{self.table}: {table.line(place, type(table.choose(*place))(**entry))}"


def _kernels(
    module: str, suite: str, kinds: Mapping[str, str], **options: str
) -> dict[str, Kernel]:
    """The kernels of a module, by what ``tilework tune`` calls them."""
    names = {table: table.rpartition(".")[2].lower() for table in kinds}
    return {
        f"{suite}.{names[table]}": Kernel(module, table, suite, kind, **options)
        for table, kind in kinds.items()
    }


_TRAINING = "forward+backward"
KERNELS = {
    **_kernels(
        "losses._classes.linear.triton.statistics",
        "linear_cross_entropy",
        {"FORWARD": "forward", "BACKWARD": _TRAINING},
    ),
    **_kernels(
        "losses.linear_kl_div.triton",
        "linear_kl_div",
        {"SUMS": "forward KL", "MIXTURE": "JSD", "BACKWARD": "forward KL"},
    ),
    **_kernels(
        "losses._classes.logits.triton",
        "losses",
        {"ADJACENT": "cross_entropy_with_z_loss"},
        candidate="tilework",
    ),
    **_kernels(
        "norms._row_norm.triton",
        "norms",
        {"FORWARD": "layer forward", "BACKWARD": "layer backward"},
    ),
    **_kernels(
        "attention.block_sparse.triton",
        "block_sparse_attention",
        {"TILES.forward": "forward", "TILES.query": _TRAINING, "TILES.key": _TRAINING},
    ),
    **_kernels("attention.block_sparse_decode.triton", "block_sparse_decode", {"ONE": "paged"}),
    **_kernels(
        "attention._attention_map.triton",
        "block_pooled_attention",
        {
            "TILES.rows": "entropy of queries",
            "TILES.columns": "mass of keys",
            "TILES.pool": "sum of blocks",
        },
    ),
    **_kernels("optim._optimizer.triton", "optim", {"TILES": "adamw"}, candidate="tilework"),
}


class Problem:
    """A case on a device, against which entries are checked and timed."""

    def __init__(
        self, kernel: Kernel, case: Case, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self._suite: Suite = suites.discover()[kernel.suite]
        self._inputs = self._suite.inputs(case, dtype, device)
        self._truth = self._suite.truth(case, self._inputs)
        candidates = {one.name: one for one in self._suite.candidates}
        # Not bind, which keeps kernels from the interpreter.
        self._ours = candidates[kernel.candidate].build
        composition = candidates[self._suite.composition].build
        try:
            results = composition(case, self._inputs).run()
            self._yardstick = accuracy.errors(results, self._truth)
        except Exception:  # it may not fit in memory
            self._yardstick = {}
        self._table = kernel.tuned()
        self.place = self._asked()
        entry = self._table.choose(*self.place)
        self._kind: Any = type(entry)
        self.start: Entry = entry._asdict()
        self.choices = {name: CHOICES.get(name, SIZES) for name in self.start}

    def _asked(self) -> "Place":
        """What the kernel asks its table for.

        Raises:
            ValueError: It does not run for this case.
        """
        reason = "it asks for no entry"
        with self._table.asked() as places:
            try:
                self._ours(self.case, self._inputs).run()
            except Exception as error:  # the table's own entry may not work here
                reason = runner.describe(error)
        if not places:
            raise ValueError(f"the kernel does not run for {self.case.name}: {reason}")
        return places[0]

    def bind(self, entry: Entry) -> Callable[[], Results]:
        """The work by an entry of the table."""
        run = self._ours(self.case, self._inputs).run

        def with_entry() -> Results:
            with self._table.override(self._kind(**entry)):
                return run()

        return with_entry

    def objection(self, entry: Entry) -> str | None:
        """Why an entry cannot be taken, if so: an error of the compiler, or a wrong result."""
        try:
            results = self.bind(entry)()
            errors = accuracy.errors(results, self._truth)
        except Exception as error:
            return runner.describe(error)
        allowed = accuracy.limits(results, self._yardstick, self.dtype, accuracy.OURS)
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
    start = problem.start
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
        for entry in neighbors(outcome.best or start, problem.choices):
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
