"""Train the small demo model while some gradients are a thousand times too large.

    python examples/demo/spikes.py runs/sweep.jsonl --out runs/spikes.jsonl

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
from sweep import SEEDS, SETTINGS, read, summaries, trained
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


def main(
    sweep: Annotated[Path, typer.Argument(help="What sweep.py wrote.")],
    out: Annotated[Path, typer.Option(help="Rows, one for each training.")] = Path(
        "runs/spikes.jsonl"
    ),
) -> None:
    """Train, and print a table."""
    rates = {one.name: one.rate for one in summaries(read(sweep))}
    rows = read(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    print("| optimizer | without spikes | with spikes |\n| --- | --- | --- |")
    clean = read(sweep)
    for name in NAMES:
        spiked = []
        for seed in range(SEEDS):
            found = [row for row in rows if (row.optimizer, row.seed) == (name, seed)]
            if not found:
                settings = replace(SETTINGS, optimizer=name, learning_rate=rates[name], seed=seed)
                found = [trained(settings, with_spikes(seed))]
                rows += found
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(found[0])) + "\n")
            spiked.append(found[0].validation)
        plain = [
            row.validation
            for row in clean
            if row.optimizer == name and row.rate == rates[name] and row.seed < SEEDS
        ]
        cells = [f"{mean(values):.3f} ± {stdev(values):.3f}" for values in (plain, spiked)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
