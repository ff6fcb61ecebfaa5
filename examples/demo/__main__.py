"""Train a small language model, built from Tilework's parts and from plain torch.nn parts.

The text is the source code of Python's standard library. Both models start from the same weights
and see the same batches, so that their validation losses must agree. The optimizer is Tilework's
AdamW for the one and torch's for the other, or with ``--optimizer`` one of Tilework's for both.
"""

import multiprocessing
import os
import shlex
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from model import PARTS, VOCABULARY
from optimizers import CHOICES
from report import plot, sample, table
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from training import CPU, CUDA, QUICK, Settings, build, read_checkpoint, train_in_child

# In bits per byte. Training amplifies rounding errors, and those of bfloat16 are coarse.
TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}
PROMPT = "def "

console = Console(highlight=False, markup=False)


def main(
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each training.")] = None,
    device: Annotated[str, typer.Option(help="cpu; or cuda, which trains a larger model.")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of everything written.", show_default="runs/demo, or runs/demo-quick"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and the text.")] = 0,
    optimizer: Annotated[
        str, typer.Option(help=f"What both are trained with: {', '.join(CHOICES)}.")
    ] = "adamw",
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model, a few steps.")] = False,
    threads: Annotated[
        int,
        typer.Option(min=1, help="Of the CPU; fewer where other programs keep it busy."),
    ] = torch.get_num_threads(),
) -> None:
    """Train a small language model with Tilework and with plain torch, and compare the two."""
    preset = QUICK if quick else CUDA if device == "cuda" else CPU
    settings = replace(
        preset, device=device, seed=seed, steps=steps or preset.steps, optimizer=optimizer
    )
    if optimizer != preset.optimizer and optimizer in CHOICES:
        settings = replace(settings, learning_rate=CHOICES[optimizer].rate)
    out = out or Path("runs", "demo-quick" if quick else "demo")
    paths = {variant: out / f"{variant}.pt" for variant in PARTS}
    problem = (
        device_problem(device)
        or optimizer_problem(optimizer)
        or (resume and resume_problem(paths, settings))
    )
    if problem:
        typer.echo(f"demo: {problem}", err=True)
        raise typer.Exit(2)

    out.mkdir(parents=True, exist_ok=True)
    for path in paths.values() if not resume else ():
        path.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Threads that spin while they wait stall each other where other programs keep the CPUs busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    torch.set_num_threads(threads)
    try:
        for variant, path in paths.items():
            train_in_fresh_process(variant, settings, path, threads)
        report(paths, settings)
    except KeyboardInterrupt:
        console.show_cursor()
        saved = any(path.exists() for path in paths.values())
        command = [sys.executable, *sys.argv, *(["--resume"] if saved and not resume else [])]
        typer.echo(f"\nStopped. To go on: {shlex.join(command)}")
        raise typer.Exit(130) from None


def device_problem(device: str) -> str | None:
    """Why the models cannot be trained there."""
    if device not in ("cpu", "cuda"):
        return f"--device must be cpu or cuda, got {device}"
    if device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: this machine has no CUDA device that torch can use"
    return None


def optimizer_problem(optimizer: str) -> str | None:
    """Why the models cannot be trained with it."""
    if optimizer in CHOICES:
        return None
    return f"--optimizer must be one of {', '.join(CHOICES)}, got {optimizer}"


def resume_problem(paths: dict[str, Path], settings: Settings) -> str | None:
    """Why training cannot go on from the checkpoints."""
    found = [path for path in paths.values() if path.exists()]
    if not found:
        return f"--resume: no checkpoint in {next(iter(paths.values())).parent}"
    for path in found:
        stored = read_checkpoint(path)["settings"]
        for name, value in asdict(settings).items():
            if stored.get(name) != value:
                return f"--resume: {path} was trained with {name} {stored.get(name)}, not {value}"
    return None


def train_in_fresh_process(variant: str, settings: Settings, path: Path, threads: int) -> None:
    """Train one model where no other has used memory or processor caches before."""
    process = multiprocessing.get_context("spawn").Process(
        target=train_in_child, args=(variant, settings, path, threads)
    )
    # Only this process answers Ctrl-C, which a terminal sends to both.
    answer = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.start()
    signal.signal(signal.SIGINT, answer)
    try:
        process.join()
    finally:
        process.terminate()
        process.join()
    if process.exitcode:
        typer.echo(f"demo: training {variant} failed", err=True)
        raise typer.Exit(1)


def report(paths: dict[str, Path], settings: Settings) -> None:
    """Compare the checkpoints, and leave with an error if they disagree."""
    runs = {variant: read_checkpoint(path) for variant, path in paths.items()}
    model = build("tilework", settings)
    model.load_state_dict(runs["tilework"]["model"])
    out = paths["tilework"].parent
    text = sample(model, PROMPT, length=500, seed=settings.seed)
    (out / "sample.txt").write_text(text, encoding="utf-8")
    plot(runs, out / "curves.png")

    console.print(Panel(Text(text), title="written by the Tilework model"))
    console.print(table(runs))
    logits = 4 * settings.batch * settings.context * VOCABULARY / 2**20
    console.print(
        f"With {VOCABULARY} classes the logits are {logits:.0f} MiB, so the fused loss has little "
        "to save here; `tilework bench linear_cross_entropy` measures vocabularies where it has."
    )
    console.print(f"Written to {out}: curves.png, sample.txt and the checkpoints.")
    one, other = (run["validation"][-1][1] for run in runs.values())
    difference = abs(one - other)
    allowed = TOLERANCE[settings.device] * CHOICES[settings.optimizer].amplifies
    agree = difference <= allowed  # False for nan
    console.print(
        f"Validation losses {'agree' if agree else 'DISAGREE'}: they differ by {difference:.1e} "
        f"bits per byte, and {allowed:.0e} is allowed.",
        style="green" if agree else "red",
    )
    if not agree:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
