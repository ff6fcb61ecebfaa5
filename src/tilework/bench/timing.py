"""Time and rates. Candidates take turns, so that a disturbance meets all of them."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

STAT = Path("/proc/stat")
PRODUCT, COPY = "matmul_flops_per_second", "copy_bytes_per_second"
SHORTEST_SAMPLE = 2e-3  # seconds; a shorter call is repeated within one sample


@dataclass(frozen=True)
class Quartiles:
    """The middle of some samples, and their spread."""

    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, samples: list[float]) -> "Quartiles":
        """The quartiles of at least two samples."""
        return cls(*statistics.quantiles(samples, n=4, method="inclusive"))


@dataclass
class Timed:
    """The samples of one candidate in seconds per call, or the error that ended them."""

    samples: list[float] = field(default_factory=list)
    error: Exception | None = None


def sample(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds per call: by events on a GPU, by the clock elsewhere."""
    if device.type == "cuda":
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def alternate(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    rounds: tuple[int, int],
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Timed]:
    """Time the runs in turn, A B A B, after one round that is thrown away.

    Args:
        runs: What to call.
        device: Where they compute.
        seconds: Rounds go on until this much time is spent.
        rounds: The fewest and the most of them.
        progress: Is told which part of the work is done.
    """
    timed = {name: Timed() for name in runs}
    calls: dict[str, int] = {}
    fewest, most = rounds
    gc.collect()
    begin = time.perf_counter()
    for number in range(most + 1):
        spent = time.perf_counter() - begin
        if number > fewest and spent >= seconds:
            break
        for name, run in runs.items():
            if timed[name].error is not None:
                continue
            try:
                value = sample(run, device, calls.get(name, 1))
            except Exception as error:
                timed[name].error = error
                continue
            if number:
                timed[name].samples.append(value)
            else:
                calls[name] = max(1, round(SHORTEST_SAMPLE / value))
        by_rule = min((number + 1) / (fewest + 1), spent / seconds if seconds else 1.0)
        progress(max(by_rule, (number + 1) / (most + 1)))
    return timed


class Others:
    """Counts the CPUs that other processes keep busy, from its making on."""

    def __init__(self) -> None:
        self._begin = _busy(), time.process_time(), time.perf_counter()

    def cpus(self) -> float | None:
        """Their average number since then, or None where the system does not tell."""
        then, own, begin = self._begin
        now = _busy()
        if then is None or now is None:
            return None
        others = (now - then) - (time.process_time() - own)
        return max(0.0, others / (time.perf_counter() - begin))


def _busy() -> float | None:
    """Seconds that all CPUs together were busy, or taken away by a hypervisor, since the boot."""
    if not STAT.exists():
        return None
    fields = [int(field) for field in STAT.read_text().split("\n")[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Limit:
    """Work that the hardware does as fast as it can, timed in turn with the candidates.

    Attributes:
        rate: Which rate it gives: ``PRODUCT`` or ``COPY``.
        work: Operations or bytes of one run.
        run: Does it.
    """

    rate: str
    work: int
    run: Callable[[], object]


def limits(
    dtype: torch.dtype, device: torch.device, *, products: bool, traffic: int
) -> list[Limit]:
    """What bounds a case on this device.

    Operations are bounded by a large matrix product. Products of half precision may be done in
    float32 as well, where a CPU has no instructions for them; elementwise operations are always
    done there. Bytes are bounded by a large copy, and by one of the case's own size, which a cache
    may hold.

    Args:
        dtype: Of the case.
        device: Where it is computed.
        products: Whether its operations are matrix products, not elementwise.
        traffic: The bytes that it must move.
    """
    size, most = (8192, 2**29) if device.type == "cuda" else (1024, 2**26)
    arithmetic = _fastest(dtype, device) if products else torch.promote_types(dtype, torch.float32)
    left, right = (torch.ones(size, size, dtype=arithmetic, device=device) for _ in range(2))
    source = torch.ones(most, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    own = min(max(traffic // 2, 1), most)
    return [
        Limit(PRODUCT, 2 * size**3, lambda: left @ right),
        Limit(COPY, 2 * most, lambda: target.copy_(source)),
        Limit(COPY, 2 * own, lambda: target[:own].copy_(source[:own])),
    ]


def _fastest(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products of this one are done fastest: its own, or a wider one."""
    wider = torch.promote_types(dtype, torch.float32)
    if device.type == "cuda" or wider == dtype:
        return dtype

    def seconds(one: torch.dtype) -> float:
        square = torch.ones(256, 256, dtype=one, device=device)
        return min(sample(lambda: square @ square, device) for _ in range(4))

    return min((dtype, wider), key=seconds)


def rates(limits: Sequence[Limit], timed: Sequence[Timed]) -> dict[str, float]:
    """The best rate of each kind, in units of work per second.

    Raises:
        Exception: A limit could not be measured.
    """
    found: dict[str, float] = {}
    for limit, times in zip(limits, timed, strict=True):
        if times.error is not None:
            raise times.error
        found[limit.rate] = max(found.get(limit.rate, 0.0), limit.work / min(times.samples))
    return found
