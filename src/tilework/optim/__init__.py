"""Optimizers, schedules, gradient transformations, and laws of training."""

from tilework.optim import gradients, laws, schedules
from tilework.optim.gradients import *
from tilework.optim.laws import *
from tilework.optim.schedules import *

__all__ = [
    *schedules.__all__,
    *gradients.__all__,
    *laws.__all__,
]
