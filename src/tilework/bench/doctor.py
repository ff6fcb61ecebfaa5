"""``tilework doctor``: what is here, what each operator uses here, and why nothing faster."""

import importlib.util
import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib import metadata

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import tilework
from tilework import _implementations, _torch, catalog
from tilework._implementations import TABLES, Implementation
from tilework.bench import results, suites

# What the optional packages that no suite names are for.
OPTIONAL = {
    "matplotlib": "tilework plot",
    "psutil": "make demo",
    "nvidia-cutlass-dsl": "torch's own fast RMSNorm on sm_90 and sm_100",
}
OLDEST = {"torch": (2, 11), "triton": (3, 6)}
_HEAD = "losses.linear_cross_entropy"
_NOT_A_GPU = ("", "CPU", "Triton's interpreter")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """Something that keeps this machine from its best, and what to do about it."""

    what: str
    hint: str


def devices() -> list[torch.device]:
    """The devices of this machine."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def report(*, everything: bool = False) -> Group:
    """The problems, the environment and what runs here, or all tables."""
    problems: list[RenderableType] = [
        Text.assemble((problem.what, "yellow"), f"\n    {problem.hint}")
        for problem in find_problems()
    ]
    parts = [*(problems or [Text("No problems found.", style="green")]), "", environment(), ""]
    if not everything:
        return Group(*parts, defaults(), "`tilework doctor --all` shows all implementations.")
    for names, _ in _implementations.shared():
        parts += [implementations(*names), ""]
    return Group(*parts, packages())


def defaults() -> Table:
    """What each operator uses on each device, one line for a table of implementations."""
    found = devices()
    result = Table("operator", *map(str, found), title="implementations used here")
    result.title_justify = "left"
    for names, entries in _implementations.shared():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        used = [
            ", ".join(
                entry.name + (" (not yet checked on a GPU)" if never_on_gpu(entry) else "")
                for entry in entries
                if _is_default(entries, entry, device)
            )
            for device in found
        ]
        result.add_row(names[0] + more, *used)
    return result


def environment() -> Table:
    """The versions, and the devices with their architectures."""
    table = Table(title="environment", title_justify="left", show_header=False)
    table.add_row("Python", f"{platform.python_version()}, {platform.platform()}")
    table.add_row("Tilework", f"{tilework.__version__}, commit {results.commit() or 'unknown'}")
    built = torch.version.cuda or torch.version.hip
    table.add_row("torch", f"{torch.__version__}, {f'for {built}' if built else 'CPU only'}")
    table.add_row("Triton", results.version("triton") or "not installed")
    for device in devices():
        table.add_row(str(device), f"{results.device_name(device)}, {_architecture(device)}")
    return table


def _architecture(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        name = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
        return f"{name or f'sm_{properties.major}{properties.minor}'}, {memory}"
    half = "" if _torch.multiplies_bfloat16() else "no "
    return (
        f"{torch.backends.cpu.get_cpu_capability()}, {half}bfloat16 products, "
        f"{torch.get_num_threads()} threads"
    )


def implementations(*operators: str) -> Table:
    """The table of implementations that operators share, the preferred one first."""
    entries = TABLES[operators[0]]
    result = Table(title=", ".join(operators), title_justify="left")
    for column in ("implementation", "here", "default on", "checked on", "memory", "deterministic"):
        result.add_column(column, overflow="fold", no_wrap=column == "implementation")
    for entry in entries:
        reason = unusable(entry)
        result.add_row(
            entry.name,
            Text("yes", "green") if reason is None else Text(f"no: {reason}", "yellow"),
            ", ".join(str(device) for device in devices() if _is_default(entries, entry, device)),
            Text(checked_on(entry), "yellow" if never_on_gpu(entry) else ""),
            entry.memory,
            "yes" if entry.deterministic else "no",
        )
    rules = [f"{entry.name}: {entry.when}" for entry in entries if entry.when]
    if rules:
        result.caption, result.caption_justify = "\n".join(rules), "left"
    return result


def schedules(tokens: int, features: int, classes: int, dtype: torch.dtype) -> Table:
    """What loss and gradients of a linear head cost by each schedule, and which is preferred."""
    from tilework.losses._classes.linear import schedule

    result = Table(
        title=f"linear_cross_entropy of {tokens} tokens, {features} features, {classes} classes, "
        f"{str(dtype).removeprefix('torch.')}",
        title_justify="left",
    )
    for column in ("device", "implementation", "operations", "beyond gradients", "default"):
        result.add_column(column)
    for device in devices():
        # Sizes without memory.
        one = torch.empty((), dtype=dtype, device=device, requires_grad=True)
        head = one.expand(tokens, features), one.expand(classes, features)
        chosen = _implementations.choose(
            _HEAD, TABLES[_HEAD], None, head[0], linear_weight=head[1], is_sum=True
        )
        again = "tiled" if chosen == "chunked" else chosen
        for cost in schedule.costs(*head):
            name = "chunked" if cost.is_chunked else again
            result.add_row(
                str(device),
                name,
                f"{cost.operations / 1e12:.3g} T",
                f"{cost.extra_bytes / 2**20:.0f} MiB",
                "yes" if name == chosen else "",
            )
    return result


def unusable(entry: Implementation) -> str | None:
    """Why an implementation cannot be used on this machine, if it cannot."""
    here = {device.type for device in devices()}
    if entry.devices and not here & set(entry.devices):
        return f"it runs on {', '.join(entry.devices)}, this machine has {', '.join(sorted(here))}"
    return _implementations.missing(entry)


def never_on_gpu(entry: Implementation) -> bool:
    """Whether an implementation made for GPUs alone has not been verified on one."""
    return bool(entry.devices) and "cpu" not in entry.devices and entry.checked_on in _NOT_A_GPU


def checked_on(entry: Implementation) -> str:
    """Where the numbers were compared with float64, and where not yet."""
    if never_on_gpu(entry):
        return ", ".join(part for part in (entry.checked_on, "not yet on a GPU") if part)
    return entry.checked_on or "nothing yet"


def _is_default(table: _implementations.Table, entry: Implementation, device: torch.device) -> bool:
    tensors = (torch.empty(0, dtype=dtype, device=device) for dtype in _DTYPES)
    return any(entry.name in _implementations.defaults(table, tensor) for tensor in tensors)


def peers() -> dict[str, str]:
    """The module of each distribution that a suite compares with."""
    return {
        candidate.distribution: candidate.package
        for suite in suites.discover().values()
        for candidate in suite.candidates
        if candidate.distribution is not None and candidate.package is not None
    }


def packages() -> Table:
    """The optional packages: what they are for, and the version found."""
    hints = suites.INSTALL
    uses = OPTIONAL | dict.fromkeys(peers(), "a peer of tilework bench")
    table = Table("package", "for", "version", title="optional packages", title_justify="left")
    for name, use in uses.items():
        found = results.version(name)
        missing = Text(f"missing: {hints.get(name, f'pip install {name}')}", style="dim")
        table.add_row(name, use, missing if found is None else found)
    return table


def find_problems() -> list[Problem]:
    """What is wrong here, each with a hint. Imports all families."""
    problems = []
    try:
        catalog.entries()
    except Exception as error:
        problems.append(
            Problem(
                f"a family cannot be imported: {error}", "Install Tilework again, or report it."
            )
        )
    if importlib.util.find_spec("triton") is None:
        problems.append(
            Problem(
                "Triton is not installed: no kernel can run.",
                "On Linux, pip install the Triton release that goes with this torch.",
            )
        )
    problems += _versions()
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        problems.append(
            Problem(
                "No GPU can be used: everything runs on the CPU.",
                "Check the driver (nvidia-smi)."
                if built
                else "With a GPU in the machine, install a torch that is built for it.",
            )
        )
    for device in devices()[1:]:
        if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
            problems.append(
                Problem(
                    f"{device} is older than sm_80, for which the kernels are made.",
                    "Pass implementation='tiled' where a kernel fails.",
                )
            )
    if os.environ.get("TRITON_INTERPRET") == "1":
        problems.append(
            Problem(
                "TRITON_INTERPRET=1: kernels run in Triton's interpreter, at a crawl.",
                "Unset it unless you test kernels without a GPU.",
            )
        )
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        problems.append(
            Problem(
                "No C++ compiler: torch.compile fails on the CPU, and its peers with it.",
                "Install g++ or clang, or set CXX.",
            )
        )
    if not _torch.multiplies_bfloat16():
        problems.append(
            Problem(
                "This CPU does not multiply bfloat16: half precision is slower than float32.",
                "Use float32 on this CPU.",
            )
        )
    return problems


def _versions() -> list[Problem]:
    """Packages that are older than the library takes, or do not belong together."""
    problems = []
    for name, oldest in OLDEST.items():
        found = results.version(name)
        if found is not None and tuple(map(int, re.findall(r"\d+", found)[:2])) < oldest:
            wanted = ".".join(map(str, oldest))
            problems.append(
                Problem(
                    f"{name} {found} is older than {wanted}, the oldest that is tested.",
                    f"pip install '{name}>={wanted}'",
                )
            )
    required = re.search(r"\btriton==([\w.]+)", " ".join(metadata.requires("torch") or ()))
    triton = results.version("triton")
    if required and triton and required[1] != triton:
        problems.append(
            Problem(
                f"Triton {triton} is not the release that torch {torch.__version__} was made for.",
                f"pip install triton=={required[1]}",
            )
        )
    return problems
