"""The commands of ``tilework``.

Bad input ends with status 2, a regression with 1, a device that stops to answer with 3.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import tilework
from tilework import catalog
from tilework.bench import browse, doctor, pages, report, results, runner, suites
from tilework.bench.suites import Candidate, Suite

DTYPES = ("float64", "float32", "bfloat16", "float16")
QUICK_SECONDS, QUICK_MINUTES = 2.0, 4.5
NO_ANSWER = 3

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool | None) -> None:
    if asked:
        typer.echo(f"tilework {tilework.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool | None,  # what a callback returns
        typer.Option("--version", callback=_version, is_eager=True, help="Print it and stop."),
    ] = None,
) -> None:
    """Tilework: which papers it implements, what this machine can run, and how fast."""


def _console() -> Console:
    console = Console()
    # A file or a pipe has no width of its own, and a table must not be cut there.
    return console if console.is_terminal else Console(width=160, soft_wrap=True)


def _refuse(argument: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=argument)


@app.command("list")
def list_(
    family: Annotated[str | None, typer.Argument(help="One family, such as losses.")] = None,
) -> None:
    """List the public names: what each is for, and the paper that it implements."""
    if family not in (None, *tilework.FAMILIES):
        raise _refuse("FAMILY", f"must be one of {', '.join(tilework.FAMILIES)}, got {family!r}")
    entries = [entry for entry in catalog.entries() if family in (None, entry.family)]
    if not entries:
        typer.echo(f"{family} has no public names yet.")
        return
    _console().print(browse.names(entries))


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(help="A public name: losses.f, f where it is unique, or C.method.")
    ],
) -> None:
    """Show the signature, docstring, paper and implementations of a public name."""
    try:
        entry, attribute = browse.find(name)
    except KeyError as error:
        matches = browse.close_matches(name)
        hint = f"; did you mean {' or '.join(matches)}?" if matches else "; see `tilework list`"
        raise _refuse("NAME", f"{error.args[0]}{hint}") from None
    _console().print(browse.describe(entry, attribute))


@app.command("doctor")
def doctor_(
    head: Annotated[
        str | None,
        typer.Option(help="TOKENS,FEATURES,CLASSES: what a linear head of that size costs."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="The dtype of that head.")] = "bfloat16",
    everything: Annotated[
        bool,
        typer.Option("--all", help="Also the tables of implementations and optional packages."),
    ] = False,
) -> None:
    """Tell what this machine has, what each operator uses on it, and why nothing faster."""
    if head is None:
        _console().print(doctor.report(everything=everything))
        return
    sizes = [int(size) if size.isdecimal() else 0 for size in head.split(",")]
    if len(sizes) != 3 or 0 in sizes:
        raise _refuse("--head", f"three sizes above 0 are accepted, got {head!r}")
    _check_dtypes([dtype])
    tokens, features, classes = sizes
    _console().print(doctor.schedules(tokens, features, classes, getattr(torch, dtype)))


@app.command()
def bench(
    suite: Annotated[list[str] | None, typer.Argument(help="Suites; all of them if none.")] = None,
    list_suites: Annotated[bool, typer.Option("--list", help="List the suites and stop.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, little time.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, or cuda where there is one.")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="In place of each case's own; repeatable.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Only peers whose name contains this; 'none' for none; repeatable."),
    ] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Cases of growing work, without peers.")
    ] = False,
    filter_: Annotated[
        str, typer.Option("--filter", help="Only cases whose name contains this.")
    ] = "",
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Time for the timing of one case.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Start no case beyond this, and the most important ones first."),
    ] = None,
    memory: Annotated[bool, typer.Option(help="Measure the peak memory.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Append the rows to this JSON lines file.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep what --out holds from this device and software."),
    ] = False,
    compare: Annotated[
        Path | None, typer.Option(help="Earlier results; status 1 if something is slower now.")
    ] = None,
) -> None:
    """Measure the suites: each candidate is checked against float64, then timed in turn."""
    chosen_suites = _suites(suite)
    where = _device(device)
    if list_suites:
        _console().print(report.suites_table(chosen_suites, where.type))
        return
    _check_dtypes(dtype)
    if quick and scaling:
        raise _refuse("--scaling", "has no quick cases; leave out --quick")
    if resume and out is None:
        raise _refuse("--resume", "needs --out, the file to take up")
    candidates = _candidates(chosen_suites, ["none"] if scaling and against is None else against)
    old = _read(compare, "--compare") if compare is not None else []
    settings = runner.Settings(where, memory=memory)
    if quick or seconds is not None:
        settings = dataclasses.replace(
            settings, seconds=QUICK_SECONDS if seconds is None else seconds
        )
    jobs = runner.plan(
        chosen_suites,
        where,
        dtypes=tuple(dtype or ()),
        quick=quick,
        growth=scaling,
        pattern=filter_,
    )
    if not jobs:
        raise _refuse("--filter", f"no case matches {filter_!r}; see `tilework bench --list`")

    def wanted(candidate: Candidate) -> bool:
        return candidate.name in candidates

    console, rows, until = _console(), list[results.Row](), None
    if quick and minutes is None:
        minutes = QUICK_MINUTES
    if minutes is not None:
        until = time.monotonic() + 60 * minutes
        jobs = runner.most_important_first(jobs)
    if resume and out is not None:
        kept = {row.key: row for row in _read(out, "--out", results.take_up)}
        here = [runner.measured(job, settings, kept, wanted) for job in jobs]
        rows = [row for found in here for row in found or ()]
        jobs = [job for job, found in zip(jobs, here, strict=True) if found is None]
        if rows:
            console.print(f"{len(rows)} rows are in {out} already, {len(jobs)} cases are left.")
    with _log(out) as log:
        try:
            for row in _measure(console, jobs, settings, wanted, until):
                rows.append(row)
                if log is not None:
                    log.write(row)
        except KeyboardInterrupt:
            console.print(f"Interrupted after {len(rows)} rows" + (f", in {out}" if out else ""))
            raise typer.Exit(130) from None
    if out is not None:
        console.print(f"{len(rows)} rows in {out}")
    if compare is not None:
        _report_regressions(console, old, rows)


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(metavar="RESULTS", help="What `bench --out` wrote.")],
    out: Annotated[Path | None, typer.Option(help="A folder; by default that of RESULTS.")] = None,
) -> None:
    """Plot time and memory, by size and against the peers, and rooflines, as PNG and SVG."""
    rows = _read(file, "RESULTS")
    try:
        from tilework.bench import plot as plots
    except ImportError as error:
        typer.echo(
            f"tilework plot needs matplotlib: pip install 'tilework[bench]' ({error})", err=True
        )
        raise typer.Exit(2) from None
    folder = file.parent if out is None else out
    try:
        paths = plots.save(rows, folder, file.stem)
    except OSError as error:
        raise _refuse("--out", f"cannot be written: {error}") from None
    if not paths:
        raise _refuse("RESULTS", f"{file} holds no row that was measured, so nothing to plot")
    for path in paths:
        typer.echo(str(path))


@app.command()
def table(
    file: Annotated[Path, typer.Argument(metavar="RESULTS", help="What `bench --out` wrote.")],
    filter_: Annotated[
        str, typer.Option("--filter", help="Only cases whose suite, name or dtype contains this.")
    ] = "",
) -> None:
    """Print recorded results as Markdown tables."""
    rows = _read(file, "RESULTS")
    try:
        typer.echo(pages.tables(rows, filter_))
    except ValueError as error:
        raise _refuse("--filter", str(error)) from None


@app.command()
def page(
    file: Annotated[Path, typer.Argument(metavar="PAGE", help="A Markdown page with blocks.")],
) -> None:
    """Fill the tables of a page in, from the recorded results that its blocks name."""
    try:
        text = pages.refresh(file)
    except ValueError as error:
        raise _refuse("PAGE", str(error)) from None
    file.write_text(text, encoding="utf-8")


@app.command()
def tune(
    kernel: Annotated[str, typer.Argument(help="Such as linear_cross_entropy.forward.")],
    seconds: Annotated[float, typer.Option(min=0, help="Begin no trial beyond this.")] = 120.0,
    device: Annotated[str | None, typer.Option(help="cuda, or one of several.")] = None,
    dtype: Annotated[str | None, typer.Option(help="In place of the case's own.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE in place of the case's; repeatable.")
    ] = None,
) -> None:
    """Measure block sizes of a kernel on this GPU, and print the entry for its table."""
    from tilework.bench import tune as tuning

    if kernel not in tuning.KERNELS:
        accepted = ", ".join(tuning.KERNELS)
        raise _refuse("KERNEL", f"must be one of {accepted}, got {kernel!r}")
    where = _device(device)
    if where.type != "cuda":
        raise _refuse("--device", "block sizes are measured on a GPU, and this is the CPU")
    try:
        from tilework import _triton
    except ImportError as error:
        raise _refuse("KERNEL", f"needs Triton: {error}") from None
    chosen = tuning.KERNELS[kernel]
    cases = suites.discover()[chosen.suite].cases(where.type)
    case = next(one for one in cases if one.kind == chosen.kind)
    case = dataclasses.replace(case, sizes=dict(case.sizes) | _sizes(size, case))
    _check_dtypes([dtype] if dtype else None)
    name = dtype or case.dtypes[0]
    console = _console()
    console.print(f"{kernel} on {_triton.architecture(where)}: {case.name} {name}")
    try:
        problem = tuning.Problem(chosen, case, getattr(torch, name), where)
    except ValueError as error:
        raise _refuse("KERNEL", str(error)) from None
    outcome = tuning.search(problem, seconds, console.print)
    console.print(
        f"{outcome.tried} entries tried, {len(outcome.skipped)} skipped: {outcome.ended}."
    )
    if outcome.best is None:
        console.print("No entry works.")
        raise typer.Exit(1)
    if outcome.seconds is not None:
        best, now = outcome.seconds
        console.print(f"{best * 1e3:.4g} ms; the entry in the table {now * 1e3:.4g} ms")
    console.print(chosen.line(problem.place, outcome.best), markup=False)


def _sizes(texts: list[str] | None, case: suites.Case) -> dict[str, int]:
    given = {}
    for text in texts or ():
        name, _, value = text.partition("=")
        if name not in case.sizes or not value.isdecimal() or int(value) == 0:
            accepted = ", ".join(f"{name}=NUMBER" for name in case.sizes)
            raise _refuse("--size", f"must be one of {accepted}, got {text!r}")
        given[name] = int(value)
    return given


def _measure(
    console: Console,
    jobs: list[runner.Job],
    settings: runner.Settings,
    wanted: Callable[[Candidate], bool],
    until: float | None,
) -> Iterator[results.Row]:
    """Yield the rows of all jobs, with a table after each job and a bar with the time left.

    A job that would last beyond ``until`` if it took as long as the one before is not begun.
    """
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=600,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=len(jobs))
        begin, last = time.monotonic(), 0.0
        for position, job in enumerate(jobs):
            if until is not None and begin + last > until:
                left = ", ".join(job.name for job in jobs[position:])
                console.print(f"Out of time, not measured: {left}")
                break

            def advance(what: str, part: float, position: int = position) -> None:
                progress.update(task, description=what, completed=position + part)

            rows = []
            for row in runner.measure(job, settings, wanted, advance):
                rows.append(row)
                yield row
            if rows:
                console.print(report.table(rows, job.suite.composition))
            if not runner.answers(settings.device):
                console.print(f"{settings.device} does not answer any more; go on with --resume")
                raise typer.Exit(NO_ANSWER)
            begin, last = time.monotonic(), time.monotonic() - begin


def _suites(names: list[str] | None) -> list[Suite]:
    found = suites.discover()
    unknown = [name for name in names or () if name not in found]
    if unknown:
        raise _refuse("SUITE", f"must be among {', '.join(found)}, got {', '.join(unknown)}")
    return [found[name] for name in dict.fromkeys(names or found)]


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = [device for one in doctor.devices() for device in (one.type, str(one))]
    if name not in here:
        accepted = ", ".join(dict.fromkeys(here))
        raise _refuse("--device", f"must be one of {accepted} on this machine, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _check_dtypes(names: list[str] | None) -> None:
    for name in names or ():
        if name not in DTYPES:
            raise _refuse("--dtype", f"must be one of {', '.join(DTYPES)}, got {name!r}")


def _candidates(chosen: list[Suite], against: list[str] | None) -> set[str]:
    """The names of our own candidates, and of the peers that ``--against`` asks for."""
    candidates = [candidate for suite in chosen for candidate in suite.candidates]
    peers = [candidate.name for candidate in candidates if candidate.peer]
    parts = [part for part in against or () if part != "none"]
    for part in parts:
        if not any(part in peer for peer in peers):
            accepted = ", ".join(dict.fromkeys(peers))
            raise _refuse("--against", f"must be none or a part of {accepted}, got {part!r}")

    def wanted(candidate: Candidate) -> bool:
        if not candidate.peer or against is None:
            return True
        return any(part in candidate.name for part in parts)

    return {candidate.name for candidate in candidates if wanted(candidate)}


def _read(
    path: Path, argument: str, read: Callable[[Path], list[results.Row]] = results.read
) -> list[results.Row]:
    try:
        return read(path)
    except ValueError as error:
        raise _refuse(argument, str(error)) from None


@contextlib.contextmanager
def _log(path: Path | None) -> Iterator[results.Log | None]:
    if path is None:
        yield None
        return
    try:
        log = results.Log(path)
    except OSError as error:
        raise _refuse("--out", f"cannot be written: {error}") from None
    with contextlib.closing(log):
        yield log


def _report_regressions(console: Console, old: list[results.Row], rows: list[results.Row]) -> None:
    worse, unmatched = results.regressions(old, rows)
    if unmatched:
        console.print(
            f"{unmatched} rows have no counterpart on this device in the earlier results."
        )
    for line in worse:
        console.print(f"regression: {line}")
    keys = {row.key for row in rows}
    disturbed = results.disturbance([*rows, *(row for row in old if row.key in keys)])
    if disturbed:
        console.print(f"This comparison is {disturbed}.")
    if worse:
        raise typer.Exit(1)
    console.print("No regression beyond the measured spread.")
