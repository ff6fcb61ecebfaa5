"""Train gates that select blocks of keys for a frozen model, and compare them with a window."""

import os
import sys
from pathlib import Path

import typer

# Threads that spin while they wait stall each other where other programs keep the CPUs busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The model, its data and its training are the demo's.
sys.path.append(str(Path(__file__).resolve().parent.parent / "demo"))

from experiment import main

if __name__ == "__main__":
    typer.run(main)
