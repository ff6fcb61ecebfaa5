"""Optimizers, schedules, gradient transformations, and laws of training."""

from tilework.optim import gradients, laws, optimizers, schedules
from tilework.optim.gradients import *
from tilework.optim.laws import *
from tilework.optim.optimizers import *
from tilework.optim.schedules import *
from tilework.optim.step_in_backward import step_in_backward

__all__ = [
    *optimizers.__all__,
    "step_in_backward",
    *schedules.__all__,
    *gradients.__all__,
    *laws.__all__,
]
