"""Train the small demo model while some gradients are a thousand times too large.

    python examples/demo/spikes.py runs/sweep.jsonl --page benchmarks/optimizers.md

In one step of twenty the gradient of one parameter is multiplied by a thousand, after the gradients
were clipped by their norm. AdamW and Stable-SPAM each run at the rate that ``sweep.py`` found best
for them, with and without such spikes, over seeds. The paper claims that Stable-SPAM loses little.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from sweep import SEEDS, SETTINGS, Row, fill, of, read, summaries, trained
from training import Run

SHARE, SIZE = 0.05, 1e3
NAMES = ("adamw", "stable_spam")


def with_spikes(seed: int) -> Callable[[Run], None]:
    """Have some gradients of a run multiplied before the step, as if by a bad batch."""
    draws = torch.Generator().manual_seed(seed)

    def prepare(run: Run) -> None:
        parameters = list(run.model.parameters())

        def spike(*arguments: Any) -> None:
            if torch.rand((), generator=draws) < SHARE:
                chosen = int(torch.randint(len(parameters), (), generator=draws))
                gradient = parameters[chosen].grad
                if gradient is not None:
                    gradient *= SIZE

        run.optimizer.register_step_pre_hook(spike)

    return prepare


def table(clean: list[Row], spiked: list[Row]) -> str:
    """In Markdown, of what ``sweep.py`` wrote and of the rows with spikes."""
    rates = {one.name: one.rate for one in summaries(clean)}
    lines = ["| optimizer | without spikes | with spikes |", "| --- | --- | --- |"]
    for name in NAMES:
        runs = [
            [of(rows, name, seed)[rates[name]].validation for seed in range(SEEDS)]
            for rows in (clean, spiked)
        ]
        cells = [f"{mean(values):.3f} ± {stdev(values):.3f}" for values in runs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    sweep: Annotated[Path, typer.Argument(help="What sweep.py wrote.")],
    out: Annotated[Path, typer.Option(help="Rows, one for each training.")] = Path(
        "runs/spikes.jsonl"
    ),
    page: Annotated[Path | None, typer.Option(help="Where to write the table.")] = None,
) -> None:
    """Train, and print a table."""
    clean, rows = read(sweep), read(out)
    rates = {one.name: one.rate for one in summaries(clean)}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        for seed in range(SEEDS):
            if of(rows, name, seed):
                continue
            settings = replace(SETTINGS, optimizer=name, learning_rate=rates[name], seed=seed)
            rows.append(trained(settings, with_spikes(seed)))
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(rows[-1])) + "\n")
    print(table(clean, rows))
    if page is not None:
        fill(page, "spikes", table(clean, rows))


if __name__ == "__main__":
    typer.run(main)
