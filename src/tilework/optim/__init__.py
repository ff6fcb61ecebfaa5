"""Optimizers, schedules and gradient transformations. Empty so far."""

__all__: list[str] = []
