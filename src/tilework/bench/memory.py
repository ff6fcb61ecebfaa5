"""Peak extra memory: what a step needs above its inputs, its results included.

On a GPU, PyTorch's allocator counts it exactly. On the CPU the high-water mark of a fresh process
is read, which the kernel keeps: the process builds the inputs, runs once at full size (imports,
thread pools, compilation), returns free pages, resets the mark and runs again.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tilework.bench import suites

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
PATIENCE = 600  # seconds


class Unmeasured(Exception):
    """The memory could not be measured. The message says why."""


def on_gpu(run: Callable[[], object], device: torch.device) -> int:
    """The allocator's peak during one run, above what was allocated before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del results
    return int(peak)


def in_fresh_process(suite: suites.Suite, case: suites.Case, dtype: str, candidate: str) -> int:
    """The resident peak of one run on the CPU, measured in a process of its own.

    Raises:
        Unmeasured: The system does not tell, or the process failed.
    """
    if not os.access(CLEAR, os.W_OK):
        raise Unmeasured(f"peak memory needs a writable {CLEAR} (Linux)")
    request = {
        "module": suite.module,
        "kind": case.kind,
        "sizes": dict(case.sizes),
        "dtype": dtype,
        "candidate": candidate,
        "threads": torch.get_num_threads(),
    }
    try:
        process = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(request)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired as error:
        raise Unmeasured(f"the memory process took more than {PATIENCE} s") from error
    if process.returncode:
        last = process.stderr.strip().rpartition("\n")[2]
        raise Unmeasured(f"the memory process ended with {process.returncode}: {last}")
    return int(process.stdout.split()[-1])


def _resident(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _measure(request: dict[str, object]) -> int:
    suite = suites.load(str(request["module"]))
    torch.set_num_threads(int(str(request["threads"])))
    sizes = request["sizes"]
    assert isinstance(sizes, dict)
    case = suites.Case(str(request["kind"]), sizes)
    inputs = suite.inputs(case, getattr(torch, str(request["dtype"])), torch.device("cpu"))
    candidate = next(one for one in suite.candidates if one.name == request["candidate"])
    step = candidate.bind(case, inputs)

    step.run()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    CLEAR.write_text("5")
    before = _resident("VmRSS")
    results = step.run()
    peak = _resident("VmHWM") - before
    del results
    return max(0, peak)


if __name__ == "__main__":
    print(_measure(json.loads(sys.argv[1])))
