"""Optimizers, schedules, gradient transformations, and how to judge learning rates."""

from tilework.optim.lr_sensitivity import lr_sensitivity

__all__ = ["lr_sensitivity"]
