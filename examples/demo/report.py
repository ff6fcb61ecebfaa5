"""What the two runs have to show: a table, a plot, and text from the model."""

from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from model import GPT
from rich.table import Table

from tilework.decoding import TypicalP

Checkpoint = dict[str, Any]


def table(runs: dict[str, Checkpoint]) -> Table:
    """The runs side by side."""
    rows = Table("", caption="Extra memory: above what the process held before its first step.")
    for title in (
        "validation,\nbits/byte",
        "median\nstep, ms",
        "\ntokens/s",
        "peak extra\nmemory, MiB",
        "\nparameters",
    ):
        rows.add_column(title, justify="right")
    for variant, run in runs.items():
        seconds = median(run["seconds"])
        rows.add_row(
            variant,
            f"{run['validation'][-1][1]:.5f}",
            f"{1000 * seconds:.1f}",
            f"{run['settings']['batch'] * run['settings']['context'] / seconds:,.0f}",
            f"{run['peak'] / 2**20:,.0f}",
            f"{sum(weight.numel() for weight in run['model'].values()):,}",
        )
    return rows


def plot(runs: dict[str, Checkpoint], path: Path) -> None:
    """The training curves with the validation points, and below how far the runs part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    curves, gap = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for (variant, run), width in zip(runs.items(), (1, 4), strict=True):
        steps = range(1, len(run["losses"]) + 1)
        line = curves.plot(steps, run["losses"], lw=width, alpha=1 / width, label=variant)
        points = zip(*run["validation"], strict=True)
        curves.plot(*points, "o", ms=4 + width, color=line[0].get_color(), zorder=4 - width / 10)
    pairs = zip(*(run["losses"] for run in runs.values()), strict=True)
    gap.semilogy(steps, [abs(one - other) for one, other in pairs], ".", color="gray", ms=2)
    curves.set(ylabel="bits per byte (dots: validation)")
    curves.legend()
    gap.set(xlabel="step", ylabel="difference\nin training")
    for axes in (curves, gap):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


@torch.no_grad()
def sample(
    model: GPT, prompt: str, length: int, seed: int, *, temperature: float = 0.8, mass: float = 0.9
) -> str:
    """Continue the prompt by ``length`` bytes, locally typical ones."""
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    keep_typical = TypicalP(mass)
    tokens = torch.tensor([list(prompt.encode())], device=device)
    for _ in range(length):
        hidden = model(tokens[:, -model.context :])[:, -1]
        logits = F.linear(hidden, model.embedding.weight) / temperature
        probabilities = keep_typical(tokens, logits).softmax(-1)
        tokens = torch.cat((tokens, probabilities.multinomial(1, generator=generator)), 1)
    return bytes(tokens[0].tolist()).decode(errors="replace")
