"""The algorithms, and what each makes of a model."""

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from subjects import Subject, encoder, language_model, quick
from torch import nn

from tilework import quant

FLOAT = "float32"


def configurations() -> Iterator[tuple[str, float, Any]]:
    """Names, nominal bits and configurations; groups are of 64 weights where there are any."""
    for bits in (4, 3, 2):
        common: dict[str, Any] = {"bits": bits, "group_size": 64}
        yield "RTN", bits, quant.RTNConfig(**common)
        yield "RTN, mse", bits, quant.RTNConfig(**common, mse=True)
        yield "AdaDim", bits, quant.AdaDimConfig(**common)
        yield "AWQ", bits, quant.AWQConfig(**common)
        yield "GPTQ", bits, quant.GPTQConfig(**common)
        yield "GPTQ, act_order", bits, quant.GPTQConfig(**common, act_order=True)
        yield "LDLQ, 2 greedy passes", bits, quant.LDLQConfig(**common, greedy_passes=2)
        yield "SpQR, groups of 16", bits, quant.SpQRConfig(bits=bits)
        yield "RTN, a grid per row", bits, quant.RTNConfig(bits=bits, group_size=None)
        yield "GPTQ, a grid per row", bits, quant.GPTQConfig(bits=bits, group_size=None)
        yield "QuIP, one grid", bits, quant.QuIPConfig(bits=bits)
    for length, residual in ((2, None), (4, None), (4, 256)):
        config = quant.VPTQConfig(vector_length=length, residual_centroids=residual)
        books = 1 if residual is None else 2
        name = f"VPTQ, vectors of {length}{', residual' if residual else ''}"
        yield name, 8 / length * books, config


@dataclass(frozen=True)
class Row:
    """A model quantized in one way."""

    model: str
    algorithm: str
    bits: float
    bits_per_weight: float
    """Of all that quantized layers store, but biases."""
    loss: float
    over_float: float
    embedding_error: float | None
    seconds: float
    bytes_on_disk: int


def measured(subject: Subject, name: str, bits: float, config: Any) -> Row:
    """Quantize a fresh model, and measure it."""
    torch.manual_seed(0)
    model = subject.make()
    base = subject.measure(model)["loss"]
    start = time.perf_counter()
    if config is None:
        stored, seconds = 32.0, 0.0
    else:
        report = quant.quantize_(model, config, subject.calibration, progress=False)
        stored, seconds = report.bits_per_weight, time.perf_counter() - start
    found = subject.measure(model)
    return Row(
        subject.name,
        name,
        bits,
        stored,
        found["loss"],
        found["loss"] - base,
        found.get("embedding_error"),
        seconds,
        _size(model),
    )


def _size(model: nn.Module) -> int:
    """Of the file that the model is saved in."""
    from safetensors.torch import save_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        is_quantized = any(isinstance(module, quant.QuantLinear) for module in model.modules())
        if is_quantized:
            quant.save_quantized(model, path)
        else:
            save_model(model, str(path))
        return path.stat().st_size


def cells(row: Row) -> list[str]:
    """Of a line of a table."""
    error = "" if row.embedding_error is None else f"{row.embedding_error:.3f}"
    return [
        row.algorithm,
        f"{row.bits:g}",
        f"{row.bits_per_weight:.2f}",
        f"{row.loss:.4f}",
        f"{row.over_float:+.4f}",
        error,
        f"{row.seconds:.1f}",
        f"{row.bytes_on_disk / 1e6:.2f}",
    ]


HEAD = [
    "algorithm",
    "bits",
    "bits per weight stored",
    "loss",
    "over float",
    "error of embeddings",
    "seconds",
    "MB on disk",
]


def markdown(rows: list[Row]) -> str:
    """The rows of a model as a table."""
    lines = [f"| {' | '.join(HEAD)} |", "| --- " * len(HEAD) + "|"]
    return "\n".join(lines + [f"| {' | '.join(cells(row))} |" for row in rows]) + "\n"


def plot(rows: list[Row], units: dict[str, str], path: Path) -> None:
    """Loss over the bits that are stored, a panel for each model."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.model for row in rows))
    figure = Figure(figsize=(6 * len(names), 5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        here = [row for row in rows if row.model == name]
        base = next(row.loss for row in here if row.algorithm == FLOAT)
        kinds = dict.fromkeys(row.algorithm.split(", vectors")[0] for row in here)
        for index, kind in enumerate(kind for kind in kinds if kind != FLOAT):
            points = sorted(
                (row.bits_per_weight, row.loss - base)
                for row in here
                if row.algorithm.split(", vectors")[0] == kind
            )
            style = {"color": f"C{index % 10}", "marker": "os^v"[index // 10]}
            axes.plot(*zip(*points, strict=True), label=kind, **style)
        axes.set(
            title=name,
            xlabel="bits per weight, all that is stored",
            ylabel=f"loss over float32, {units.get(name, '')}",
            yscale="log",
            xlim=(1, 12),
        )
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def fill(page: Path, name: str, text: str) -> None:
    """Write a table into its block of a page."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    page.write_text(block.sub(rf"\1\n{text}\n\2", page.read_text(encoding="utf-8")), "utf-8")


def main(
    models: Annotated[
        list[str] | None, typer.Argument(help="demo, encoder or quick; demo by default.")
    ] = None,
    checkpoint: Annotated[
        Path, typer.Option(help="Of the demo's model; trained if it is not there.")
    ] = Path("runs/demo/tilework.pt"),
    out: Annotated[Path, typer.Option(help="Rows, one for each way.")] = Path(
        "runs/quantized.jsonl"
    ),
    figure: Annotated[Path | None, typer.Option(help="Where to draw losses over bits.")] = None,
    page: Annotated[Path | None, typer.Option(help="Where to write the tables.")] = None,
) -> None:
    """Quantize trained models in every way, and show tables."""
    console = Console()
    known: dict[str, Callable[[], Subject]] = {
        "demo": lambda: language_model(checkpoint),
        "encoder": encoder,
        "quick": lambda: quick(checkpoint),
    }
    names = models or ["demo"]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"models are {', '.join(known)}, got {', '.join(unknown)}")
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    out.parent.mkdir(parents=True, exist_ok=True)
    units = {}
    for name in names:
        subject = known[name]()
        units[subject.name] = subject.unit
        ways = [(FLOAT, 32.0, None), *configurations()]
        for algorithm, bits, config in ways:
            done = (subject.name, algorithm, bits)
            if any((row.model, row.algorithm, row.bits) == done for row in rows):
                continue
            rows.append(measured(subject, algorithm, bits, config))
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(rows[-1])) + "\n")
            console.print(*cells(rows[-1]), sep="  ")
        here = [row for row in rows if row.model == subject.name]
        shown = Table(*HEAD, title=f"{subject.name}, {subject.unit}")
        for row in here:
            shown.add_row(*cells(row))
        console.print(shown)
        if page is not None:
            fill(page, subject.name, markdown(here))
    if figure is not None:
        plot(rows, units, figure)
