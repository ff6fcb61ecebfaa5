"""The script that measures what calls cost the host."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "host_time.py"


def test_prints_a_time_for_each_call() -> None:
    command = [sys.executable, str(SCRIPT), "--calls", "3"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    times = {line[:33].strip(): float(line.split()[-2]) for line in output.splitlines()}
    assert {"rms_norm", "layer_norm, with gradients", "rms_norm, backward"} < times.keys()
    assert {"AdamW, 200 tensors", "torch's AdamW, foreach"} < times.keys()
    assert all(0 < microseconds < 1e5 for microseconds in times.values())
