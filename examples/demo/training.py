"""Training with checkpoints, of one model at a time."""

import math
import multiprocessing
import os
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from data import draw, read_corpus, spread
from model import GPT, PARTS
from optimizers import CHOICES
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """Everything that a run's numbers depend on; a checkpoint continues only under its own."""

    device: str = "cpu"
    seed: int = 0
    steps: int = 1000
    interval: int = 100  # steps from one checkpoint and validation to the next
    width: int = 128
    depth: int = 5
    heads: int = 4
    context: int = 128
    batch: int = 8
    windows: int = 256  # of text for validation
    # Larger rates let rounding errors grow until two exact models part by more than is allowed.
    learning_rate: float = 5e-4
    optimizer: str = "adamw"
    python: str = platform.python_version()  # whose library is the text
    torch: str = str(torch.__version__)


CPU = Settings()
CUDA = Settings(width=768, depth=12, heads=12, context=1024, batch=32)
QUICK = Settings(
    steps=30, interval=5, width=64, depth=2, heads=2, context=64, windows=32, learning_rate=1e-3
)


class Run:
    """A model in training, and everything that its checkpoint holds."""

    def __init__(self, variant: str, settings: Settings) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        self.model = build(variant, settings)
        rate, choice = settings.learning_rate, CHOICES[settings.optimizer]
        if (variant, settings.optimizer) == ("torch", "adamw"):
            choice = replace(choice, kind=torch.optim.AdamW)
        self.optimizer = choice.make(self.model, rate)
        self.takes_loss = choice.takes_loss
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, rate, settings.steps, pct_start=0.1, cycle_momentum=False
        )
        self.batches = torch.Generator().manual_seed(settings.seed)
        self.record: dict[str, Any] = {"losses": [], "seconds": [], "validation": [], "peak": 0}

    @property
    def steps(self) -> int:
        """How many were taken."""
        return len(self.record["losses"])

    def advance(self, text: Tensor) -> None:
        """Take one step, on the next batch."""
        start = time.perf_counter()
        tokens = draw(text, self.settings.batch, self.settings.context, self.batches)
        tokens = tokens.to(self.device)
        with self.autocast():
            loss = self.model.loss(self.model(tokens), self.model.embedding.weight, tokens)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(**({"loss": loss.detach()} if self.takes_loss else {}))
        self.schedule.step()
        self.record["losses"].append(loss.item() / math.log(2))
        self.record["seconds"].append(time.perf_counter() - start)

    @torch.no_grad()
    def validate(self, windows: Tensor) -> None:
        """Append the mean bits per byte of the windows."""
        with self.autocast():
            losses = [
                self.model.validation_loss(self.model(tokens), self.model.embedding.weight, tokens)
                for tokens in torch.split(windows.to(self.device), self.settings.batch)
            ]
        bits = torch.stack(losses).double().mean().item() / math.log(2)
        self.record["validation"].append((self.steps, bits))

    def autocast(self) -> torch.autocast:
        """Bfloat16 products on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")

    def save(self, path: Path) -> None:
        """Write the checkpoint whole or not at all."""
        unfinished = path.with_suffix(".tmp")
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.get_state(),
        }
        torch.save(state | self.record, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Go back to a checkpoint."""
        state = read_checkpoint(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.set_state(state["batches"])
        self.record = {name: state[name] for name in self.record}


def build(variant: str, settings: Settings) -> GPT:
    """The model with its initial weights, which are the same for all variants."""
    torch.manual_seed(settings.seed)
    shape = settings.width, settings.depth, settings.heads, settings.context
    return GPT(*shape, PARTS[variant]).to(settings.device)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, its tensors on the CPU."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def train(variant: str, settings: Settings, path: Path) -> None:
    """Train to the last step, from the checkpoint if there is one, and leave a checkpoint."""
    run = Run(variant, settings)
    if path.exists():
        run.load(path)
    text, held_out = read_corpus()
    windows = spread(held_out, settings.windows, settings.context)
    before = memory(run.device)
    with progress(variant, settings.steps, settings.interval, run.steps) as show:
        while run.steps < settings.steps:
            run.advance(text)
            rate = settings.batch * settings.context / run.record["seconds"][-1]
            show(run.steps, f"{run.record['losses'][-1]:.3f} bits per byte, {rate:,.0f} tokens/s")
            if run.steps % settings.interval == 0 or run.steps == settings.steps:
                run.validate(windows)
                extra = memory(run.device, peak=True) - before
                run.record["peak"] = max(run.record["peak"], extra)
                run.save(path)


def train_in_child(variant: str, settings: Settings, path: Path, threads: int) -> None:
    """Train as a process of its own, which ends with its parent however that ends."""

    def end_with(parent: multiprocessing.process.BaseProcess) -> None:
        parent.join()
        os._exit(1)  # a checkpoint is whole or not there

    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    train(variant, settings, path)


@contextmanager
def progress(
    name: str, steps: int, interval: int, done: int = 0
) -> Iterator[Callable[[int, str], None]]:
    """Show the steps done and a note: as a bar, or without a terminal as a line per interval."""
    if not Console().is_terminal:

        def show(done: int, note: str) -> None:
            if done % interval == 0 or done == steps:
                print(f"{name}: {done}/{steps} steps, {note}", flush=True)

        yield show
        return
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[note]}"
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task(f"{name:8}", True, steps, done, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)


def memory(device: torch.device, *, peak: bool = False) -> int:
    """Bytes in use, or their maximum until now: PyTorch's on a GPU, else this process's."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device)
    if not peak:
        return int(psutil.Process().memory_info().rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
