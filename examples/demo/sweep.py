"""Train the small demo model with every optimizer, each at the best of some learning rates.

    python examples/demo/sweep.py --out runs/sweep.jsonl --page benchmarks/optimizers.md

Rates a factor of 2 apart are tried, beginning with the demo's, until the best one has worse ones
on both sides; with that one other seeds follow. A row for each training is appended to the file,
and what is there already is not trained again. The table and the figure are made from the rows; a
page has the table between ``<!-- sweep -->`` and ``<!-- end -->``.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated

# Threads that spin while they wait stall each other where other programs keep the CPUs busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

import torch
import typer
from data import read_corpus, spread
from optimizers import CHOICES
from rich.console import Console
from rich.progress import track
from training import QUICK, Run, Settings

SETTINGS = replace(QUICK, steps=300, interval=30)
FACTOR = 2.0
SEEDS = 3


@dataclass(frozen=True)
class Row:
    """One training."""

    optimizer: str
    rate: float
    seed: int
    steps: int
    validation: float
    """Bits per byte after the last step; nan if the training diverged."""
    milliseconds: float
    """The median step, forward and backward pass included."""
    state_bytes: float
    """For each parameter."""
    curve: list[tuple[int, float]]


def trained(settings: Settings, prepare: Callable[[Run], None] = lambda run: None) -> Row:
    """Train one model, prepared in some way."""
    run = Run("tilework", settings)
    prepare(run)
    text, held_out = read_corpus()
    windows = spread(held_out, settings.windows, settings.context)
    while run.steps < settings.steps and not diverged(run):
        run.advance(text)
        if run.steps % settings.interval == 0:
            run.validate(windows)
    parameters = sum(p.numel() for p in run.model.parameters())
    held = sum(
        state.nbytes
        for states in run.optimizer.state.values()
        for name, state in states.items()
        if name != "step" and isinstance(state, torch.Tensor)
    )
    curve = run.record["validation"]
    return Row(
        settings.optimizer,
        settings.learning_rate,
        settings.seed,
        settings.steps,
        math.nan if diverged(run) else curve[-1][1],
        1000 * median(run.record["seconds"]),
        held / parameters,
        curve,
    )


def diverged(run: Run) -> bool:
    """Whether the last loss is no number."""
    losses = run.record["losses"]
    return bool(losses) and not math.isfinite(losses[-1])


def read(path: Path) -> list[Row]:
    """The rows of a file, none if it is not there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Row(**json.loads(line)) for line in lines]


def of(rows: list[Row], name: str, seed: int = 0) -> dict[float, Row]:
    """The rows of an optimizer by rate."""
    found = [row for row in rows if (row.optimizer, row.seed) == (name, seed)]
    return {row.rate: row for row in sorted(found, key=lambda row: row.rate)}


def loss(row: Row) -> float:
    """The validation, the worst possible if the training diverged."""
    return row.validation if math.isfinite(row.validation) else math.inf


def next_training(rows: list[Row], name: str) -> Settings | None:
    """What to train next with an optimizer, or None if all is there."""
    settings = replace(SETTINGS, optimizer=name)
    tried = of(rows, name)
    if not tried:
        return replace(settings, learning_rate=CHOICES[name].rate)
    best = min(tried.values(), key=loss).rate
    for rate in (best * FACTOR, best / FACTOR):
        if not any(math.isclose(rate, other) for other in tried):
            return replace(settings, learning_rate=rate)
    for seed in range(1, SEEDS):
        if best not in of(rows, name, seed):
            return replace(settings, learning_rate=best, seed=seed)
    return None


def trainings(rows: list[Row], name: str) -> Iterator[Settings]:
    """All that are still to do with an optimizer; the rows must grow by each."""
    while (settings := next_training(rows, name)) is not None:
        yield settings


@dataclass(frozen=True)
class Summary:
    """An optimizer at its best rate, over seeds."""

    name: str
    rate: float
    validation: float
    deviation: float
    milliseconds: float
    state_bytes: float


def summaries(rows: list[Row]) -> list[Summary]:
    """The optimizers that are done, the best first."""
    found = []
    for name in CHOICES:
        if next_training(rows, name) is not None:
            continue
        best = min(of(rows, name).values(), key=loss).rate
        same = [row for seed in range(SEEDS) for row in [of(rows, name, seed)[best]]]
        values = [row.validation for row in same]
        time = median(row.milliseconds for row in same)
        found.append(Summary(name, best, mean(values), stdev(values), time, same[0].state_bytes))
    return sorted(found, key=lambda summary: summary.validation)


def table(rows: list[Row]) -> str:
    """In Markdown."""
    titles = "optimizer", "learning rate", "bits per byte", "± over seeds", "ms per step"
    lines = [f"| {' | '.join(titles)} | state bytes per parameter |", "| --- " * 6 + "|"]
    lines += [
        f"| {one.name} | {one.rate:.2g} | {one.validation:.3f} | {one.deviation:.3f} "
        f"| {one.milliseconds:.1f} | {one.state_bytes:.2g} |"
        for one in summaries(rows)
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Validation by step at the best rates, and by rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    curves, rates = figure.subplots(1, 2)
    for index, one in enumerate(summaries(rows)):
        style = {"color": f"C{index % 10}", "ls": "-" if index < 10 else "--"}
        curve = of(rows, one.name)[one.rate].curve
        curves.plot(*zip(*curve, strict=True), label=one.name, **style)
        tried = of(rows, one.name)
        rates.loglog(list(tried), [row.validation for row in tried.values()], marker=".", **style)
    curves.set(xlabel="step", ylabel="validation, bits per byte", yscale="log")
    rates.set(xlabel="learning rate", ylabel="validation after the last step")
    curves.legend(ncols=2, fontsize="small")
    for axes in (curves, rates):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)


def fill(page: Path, name: str, text: str) -> None:
    """Write a table into its block of a page."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    page.write_text(block.sub(rf"\1\n{text}\n\2", page.read_text(encoding="utf-8")), "utf-8")


def main(
    out: Annotated[Path, typer.Option(help="Rows, one for each training.")] = Path(
        "runs/sweep.jsonl"
    ),
    figure: Annotated[Path | None, typer.Option(help="Where to draw the curves.")] = None,
    page: Annotated[Path | None, typer.Option(help="Where to write the table.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Optimizers; all by default.")] = None,
) -> None:
    """Train with every optimizer, and print a table."""
    console = Console()
    rows = read(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in track(only or list(CHOICES), "optimizers", console=console):
        for settings in trainings(rows, name):
            row = trained(settings)
            rows.append(row)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    print(table(rows))
    if page is not None:
        fill(page, "sweep", table(rows))
    if figure is not None:
        plot(rows, figure)


if __name__ == "__main__":
    typer.run(main)
