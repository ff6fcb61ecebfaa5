"""Time and rates. Candidates take turns, so that a disturbance meets all of them."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

STAT = Path("/proc/stat")
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


def limits(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[int, Callable[[], object]]]:
    """What the hardware can do: a large matrix product and a large copy, each with its work.

    They are to be timed in turn with the candidates; their best time gives the rate.
    """
    size, count = (8192, 2**29) if device.type == "cuda" else (1024, 2**26)
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return {
        "matmul_flops_per_second": (2 * size**3, lambda: left @ right),
        "copy_bytes_per_second": (2 * count, lambda: target.copy_(source)),
    }
