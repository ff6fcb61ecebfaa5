"""Which of torch's operators, or on a GPU which kernels, took the time of a run."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity

LEAST = 0.1  # part of the time of a run
MOST = 3
LONGEST = 60  # characters of a kernel's name, which templates make long


def names(run: Callable[[], object], device: torch.device) -> list[str]:
    """The operators or kernels with a tenth of a run's time each, up to three, longest first."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with _silent(), torch.profiler.profile(activities=[activity]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    times: dict[str, float] = {}
    events: Any = profiler.key_averages()
    for event in events:
        name = re.sub(r"## Call \w+ .*", "compiled graph", event.key)[:LONGEST]
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        times[name] = times.get(name, 0.0) + time
    total = sum(times.values())
    largest = sorted(times, key=lambda name: -times[name])[:MOST]
    return [name for name in largest if times[name] >= LEAST * total > 0]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what the profiler logs from the terminal."""
    saved = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
