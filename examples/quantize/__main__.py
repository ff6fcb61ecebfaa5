"""Quantize trained models with every algorithm, and measure what it costs."""

import os
import sys
from pathlib import Path

import typer

# Threads that spin while they wait stall each other where other programs keep the CPUs busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# One of the models, its data and its training are the demo's.
sys.path.append(str(Path(__file__).resolve().parent.parent / "demo"))

from quantization import main

if __name__ == "__main__":
    typer.run(main)
