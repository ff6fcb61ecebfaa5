"""Train gates that select blocks of keys for a frozen model, and compare them with a window."""

import sys
from pathlib import Path

import typer

# The model, its data and its training are the demo's.
sys.path.append(str(Path(__file__).resolve().parent.parent / "demo"))

from experiment import main

if __name__ == "__main__":
    typer.run(main)
