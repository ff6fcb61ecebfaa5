"""The rows of a benchmark: one JSON object per line, described in ``benchmarks/README.md``."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import tilework

SCHEMA = 1
OK, REFUSED, MISSING, FAILED = ("ok", "refused", "missing", "failed")
QUIET = 0.1  # CPUs that other processes may keep busy during a timing
TOLERANCE = 0.05  # a slowdown below this is not reported, however small the spread

Key = tuple[str, str, str, str, str]


@dataclass
class Row:
    """One candidate on one case. Times are in seconds, sizes in bytes; None is not measured."""

    suite: str
    case: str
    kind: str
    sizes: dict[str, int]
    dtype: str
    device: str
    device_name: str
    candidate: str
    peer: bool
    status: str = OK
    reason: str | None = None
    default: bool = False
    kernel: str | None = None
    errors: dict[str, float | None] = field(default_factory=dict)
    allowed: dict[str, float] = field(default_factory=dict)
    median: float | None = None
    q1: float | None = None
    q3: float | None = None
    runs: int = 0
    others_cpus: float | None = None
    peak_bytes: int | None = None
    flops: int | None = None
    traffic_bytes: int | None = None
    fraction_of_limit: float | None = None
    limits: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str | None] = field(default_factory=dict)
    threads: int | None = None
    commit: str | None = None
    timestamp: str | None = None
    schema: int = SCHEMA

    @property
    def key(self) -> Key:
        """What two runs have in common for the same measurement."""
        return self.suite, self.case, self.dtype, self.device_name, self.candidate

    def to_json(self) -> str:
        """The row on one line. nan and infinities, which JSON lacks, become null."""
        record = dataclasses.asdict(self)
        record["errors"] = {
            name: error if error is not None and math.isfinite(error) else None
            for name, error in self.errors.items()
        }
        return json.dumps(record, allow_nan=False)


class Log:
    """A file to which rows are appended, each of them whole and on disk before the next."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append a row."""
        self._file.write(row.to_json() + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path) -> list[Row]:
    """The rows of a file; of repeated measurements, the last.

    Raises:
        ValueError: The file cannot be read, or a line is not a row of this schema.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    rows = [_parse(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line]
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return list({row.key: row for row in rows}.values())


def take_up(path: Path) -> list[Row]:
    """The rows of a file that is to be appended to, none if there is no such file.

    A last line without an end, left by a run that was killed, is cut off.

    Raises:
        ValueError: The file cannot be read, or a line is not a row of this schema.
    """
    if not path.exists():
        return []
    try:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return read(path) if whole else []


def same_origin(one: Row, other: Row) -> bool:
    """Whether two rows were measured with the same software, on the same device and threads."""
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("device_name", "threads", "versions", "commit")
    )


def _parse(line: str, where: str) -> Row:
    accepted = f"a row that `tilework bench --out` wrote, schema {SCHEMA}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must be {accepted}, got no JSON: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        schema = record.get("schema") if isinstance(record, dict) else None
        raise ValueError(f"{where} must be {accepted}, got schema {schema}")
    try:
        return Row(**record)
    except TypeError as error:
        raise ValueError(f"{where} must be {accepted}: {error}") from error


def disturbance(rows: Iterable[Row]) -> str | None:
    """Why times are not sound, if other processes kept CPUs busy while any of them was taken."""
    busy = max((row.others_cpus or 0.0 for row in rows), default=0.0)
    if busy <= QUIET:
        return None
    return f"not sound: other processes kept {busy:.1f} CPUs busy during the timing"


def regressions(old: Iterable[Row], new: Iterable[Row]) -> tuple[list[str], int]:
    """What became worse, in words, and how many new rows have no counterpart to compare with.

    A time is worse when the median rose by more than both interquartile ranges together, and by
    more than 5%. A measured row that is no longer ok is worse, whatever it took.
    """
    before = {row.key: row for row in old if row.status == OK}
    worse, unmatched = [], 0
    for row in new:
        past = before.get(row.key)
        if past is None:
            unmatched += row.status == OK
            continue
        what = f"{row.suite} {row.case} {row.dtype}, {row.candidate}"
        if row.status != OK:
            worse.append(f"{what}: was measured, now {row.status}: {row.reason}")
            continue
        then, now = _quartiles(past), _quartiles(row)
        spread = (then[2] - then[0]) + (now[2] - now[0])
        if now[1] - then[1] > max(spread, TOLERANCE * then[1]):
            line = (
                f"{what}: {then[1]:.4g} s -> {now[1]:.4g} s "
                f"({now[1] / then[1]:.2f}x, spread {spread:.2g} s)"
            )
            worse.append("; ".join(filter(None, (line, disturbance((past, row))))))
    return worse, unmatched


def _quartiles(row: Row) -> Sequence[float]:
    values = (row.q1, row.median, row.q3)
    if None in values:
        raise ValueError(f"{row.suite} {row.case}, {row.candidate}: status ok but no time")
    return [value for value in values if value is not None]


@functools.cache
def versions() -> dict[str, str | None]:
    """Of everything that has a part in the measurement."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "tilework": tilework.__version__,
        "sources": sources(),
    }


@functools.cache
def sources() -> str:
    """A digest of the package's files, which a commit does not tell where there is no git."""
    package = Path(tilework.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def version(distribution: str) -> str | None:
    """The installed version of a package, if it is installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this package is imported from, if it is one."""
    package = Path(tilework.__file__).resolve().parent
    git = ["git", "-C", str(package)]
    try:
        root = subprocess.run(
            [*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True
        ).stdout.strip()
        if Path(root) / "src" / "tilework" != package:
            return None  # installed inside somebody else's checkout
        return subprocess.run(
            [*git, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@functools.cache
def device_name(device: torch.device) -> str:
    """The processor, in its maker's words."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
