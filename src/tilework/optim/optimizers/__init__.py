"""Optimizers, each in a file that reads like its paper's algorithm."""

from tilework.optim.optimizers.adabelief import AdaBelief
from tilework.optim.optimizers.adafactor import Adafactor
from tilework.optim.optimizers.adam_atan2 import AdamATan2
from tilework.optim.optimizers.adamp import AdamP
from tilework.optim.optimizers.adamw import AdamW
from tilework.optim.optimizers.fadam import FAdam
from tilework.optim.optimizers.lion import Lion
from tilework.optim.optimizers.sgdp import SGDP
from tilework.optim.optimizers.sgdw import SGDW
from tilework.optim.optimizers.stable_spam import StableSPAM

__all__ = [
    "SGDP",
    "SGDW",
    "AdaBelief",
    "AdamATan2",
    "AdamP",
    "AdamW",
    "Adafactor",
    "FAdam",
    "Lion",
    "StableSPAM",
]
