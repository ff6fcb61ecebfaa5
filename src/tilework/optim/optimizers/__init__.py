"""Optimizers, each in a file that reads like its paper's algorithm."""

from tilework.optim.optimizers.adafactor import Adafactor
from tilework.optim.optimizers.adamw import AdamW
from tilework.optim.optimizers.lion import Lion
from tilework.optim.optimizers.sgdw import SGDW

__all__ = ["SGDW", "AdamW", "Adafactor", "Lion"]
