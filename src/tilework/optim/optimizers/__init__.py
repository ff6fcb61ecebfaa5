"""Optimizers, each in a file that reads like its paper's algorithm."""

from tilework.optim.optimizers.ada_grad_norm import AdaGradNorm
from tilework.optim.optimizers.adabelief import AdaBelief
from tilework.optim.optimizers.adafactor import Adafactor
from tilework.optim.optimizers.adam_atan2 import AdamATan2
from tilework.optim.optimizers.adamp import AdamP
from tilework.optim.optimizers.adamw import AdamW
from tilework.optim.optimizers.alrshb import ALRSHB
from tilework.optim.optimizers.alrsmag import ALRSMAG
from tilework.optim.optimizers.fadam import FAdam
from tilework.optim.optimizers.lamb import LAMB
from tilework.optim.optimizers.lars import LARS
from tilework.optim.optimizers.lawn import LAWN
from tilework.optim.optimizers.lion import Lion
from tilework.optim.optimizers.scaled_gd import ScaledGD, precondition_low_rank
from tilework.optim.optimizers.sgdp import SGDP
from tilework.optim.optimizers.sgdw import SGDW
from tilework.optim.optimizers.stable_spam import StableSPAM
from tilework.optim.optimizers.steepest_descent import SteepestDescent

__all__ = [
    "ALRSHB",
    "ALRSMAG",
    "AdaBelief",
    "AdaGradNorm",
    "Adafactor",
    "AdamATan2",
    "AdamP",
    "AdamW",
    "FAdam",
    "LAMB",
    "LARS",
    "LAWN",
    "SGDW",
    "Lion",
    "SGDP",
    "ScaledGD",
    "StableSPAM",
    "SteepestDescent",
    "precondition_low_rank",
]
