"""Train a model, then its gates, then compare ways to choose blocks."""

import copy
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from data import draw, read_corpus, spread
from gated import (
    Choose,
    GatedAttention,
    Heads,
    add_gates,
    choices,
    dense,
    distill,
    soft,
    sparse,
    true_map,
)
from model import GPT
from rich.console import Console
from rich.table import Table
from torch import Tensor
from training import Settings, build, progress, read_checkpoint, train

OBJECTIVES = {"distill": distill, "soft": soft}

console = Console(highlight=False, markup=False)


@dataclass(frozen=True)
class Preset:
    """A model and its gates."""

    model: Settings
    block_size: int
    steps: int  # of the gates
    interval: int  # of them, from one line of progress to the next
    learning_rate: float


FULL = Preset(
    Settings(steps=400, depth=4, context=1024, batch=2, windows=24, learning_rate=1e-3),
    block_size=16,
    steps=150,
    interval=15,
    learning_rate=5e-3,
)
QUICK = Preset(
    Settings(
        steps=60, interval=60, width=64, depth=2, heads=2, context=256, batch=4, windows=8,
        learning_rate=2e-3,
    ),
    block_size=4,
    steps=40,
    interval=10,
    learning_rate=1e-2,
)  # fmt: skip


def main(
    objective: Annotated[str, typer.Option(help="distill, or soft: the model's loss.")] = "distill",
    sparsity: Annotated[float, typer.Option(help="The part of the blocks to leave out.")] = 0.9,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of everything written.", show_default="runs/gate, or runs/gate-quick"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model, a few steps.")] = False,
    threads: Annotated[
        int,
        typer.Option(min=1, help="Of the CPU; fewer where other programs keep it busy."),
    ] = torch.get_num_threads(),
) -> None:
    """Train gates of a frozen model, and compare what they select with a window."""
    problem = None
    if objective not in OBJECTIVES:
        problem = f"--objective must be one of {', '.join(OBJECTIVES)}, got {objective}"
    elif not 0 < sparsity < 1:
        problem = f"--sparsity must be above 0 and below 1, got {sparsity}"
    if problem:
        typer.echo(f"gate: {problem}", err=True)
        raise typer.Exit(2)

    preset = QUICK if quick else FULL
    out = out or Path("runs", "gate-quick" if quick else "gate")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    model = base_model(preset, seed, out / "model.pt")
    modules = add_gates(model, preset.block_size)
    untrained = {module: copy.deepcopy(module.gate) for module in modules}
    train_gates(model, modules, objective, preset, seed)
    torch.save([module.gate.state_dict() for module in modules], out / "gates.pt")
    gates = {
        "trained gate": {module: module.gate for module in modules},
        "untrained gate": untrained,
    }
    rows = compare(model, modules, choices(gates, 1 - sparsity), preset.model)
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    report(rows, sparsity)


def base_model(preset: Preset, seed: int, path: Path) -> GPT:
    """The demo's model, trained here or before."""
    settings = Settings(**asdict(preset.model) | {"seed": seed})
    if path.exists() and read_checkpoint(path)["settings"] != asdict(settings):
        console.print(f"{path} was trained otherwise; it is trained anew.")
        path.unlink()
    train("tilework", settings, path)
    model = build("tilework", settings)
    model.load_state_dict(read_checkpoint(path)["model"])
    return model


def train_gates(
    model: GPT, modules: list[GatedAttention], objective: str, preset: Preset, seed: int
) -> None:
    """Train the gates, and nothing else."""
    text, _ = read_corpus()
    weights = [weight for module in modules for weight in module.gate.parameters()]
    optimizer = torch.optim.AdamW(weights, preset.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, preset.learning_rate, preset.steps, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed + 1)
    attend_by(modules, OBJECTIVES[objective])
    with progress("gates", preset.steps, preset.interval) as show:
        for step in range(1, preset.steps + 1):
            tokens = draw(text, preset.model.batch, preset.model.context, generator)
            hidden = model(tokens)
            if objective == "distill":
                losses = [module.loss for module in modules if module.loss is not None]
                loss = torch.stack(losses).sum()
            else:
                loss = model.loss(hidden, model.embedding.weight, tokens)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            show(step, f"loss {loss.item():.3f}")


def attend_by(modules: list[GatedAttention], attend: Any) -> None:
    """Let all attentions of a model attend in one way."""
    for module in modules:
        module.attend = attend


@torch.no_grad()
def compare(
    model: GPT, modules: list[GatedAttention], chosen: dict[str, Choose], settings: Settings
) -> list[dict[str, Any]]:
    """Of each choice, the blocks it takes, the mass it recalls, and the loss of attending to it."""
    _, held_out = read_corpus()
    windows = spread(held_out, settings.windows, settings.context)
    recalled = dict.fromkeys(chosen, 0.0)
    densities = dict.fromkeys(chosen, 0.0)

    def measure(module: GatedAttention, heads: Heads) -> Tensor:
        mass = true_map(module, heads, pool="sum", normalize=False)
        for name, choose in chosen.items():
            layout = choose(module, heads)
            recalled[name] += float((mass * layout.to_dense()).sum() / mass.sum())
            densities[name] += float(layout.density(is_causal=True))
        return dense(module, heads)

    attend_by(modules, measure)
    loss = bits(model, windows, settings)
    rows: list[dict[str, Any]] = [{"blocks": "all", "density": 1.0, "recall": 1.0, "bits": loss}]
    calls = len(modules) * -(-settings.windows // settings.batch)
    for name, choose in chosen.items():
        attend_by(modules, sparse(choose))
        row = {"blocks": name, "density": densities[name] / calls, "recall": recalled[name] / calls}
        rows.append(row | {"bits": bits(model, windows, settings)})
    return rows


def bits(model: GPT, windows: Tensor, settings: Settings) -> float:
    """Mean bits per byte."""
    losses = [
        model.validation_loss(model(tokens), model.embedding.weight, tokens)
        for tokens in torch.split(windows, settings.batch)
    ]
    return float(torch.stack(losses).double().mean()) / math.log(2)


def report(rows: list[dict[str, Any]], sparsity: float) -> None:
    """Print the table, and leave with an error if the gates have learned nothing."""
    table = Table("blocks by", title=f"{sparsity:.0%} of the live blocks left out")
    for title in ("density", "attention mass\nrecalled", "validation,\nbits/byte", "\nover dense"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row["blocks"],
            f"{row['density']:.3f}",
            f"{row['recall']:.3f}",
            f"{row['bits']:.4f}",
            f"{row['bits'] - rows[0]['bits']:+.4f}",
        )
    console.print(table)
    dense, gate, *others = (
        next(row for row in rows if row["blocks"] == name)
        for name in ("all", "trained gate", "untrained gate", "window", "window and first block")
    )
    most = max(others, key=lambda row: float(row["recall"]))
    least = min(others, key=lambda row: float(row["bits"]))
    learned, better = gate["recall"] > most["recall"], gate["bits"] < least["bits"]
    console.print(
        f"The trained gate recalls {'more' if learned else 'NO MORE'} than the best of the others "
        f"({gate['recall']:.3f}, {most['blocks']} {most['recall']:.3f}); its loss over dense is "
        f"{'lower' if better else 'NO LOWER'} than theirs ({gate['bits'] - dense['bits']:+.4f}, "
        f"{least['blocks']} {least['bits'] - dense['bits']:+.4f} bits per byte).",
        style="red" if not learned else "green" if better else "yellow",
    )
    if not learned:
        raise typer.Exit(1)
