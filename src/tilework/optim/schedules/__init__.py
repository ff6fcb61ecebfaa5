"""Schedules: functions of the step, as ``torch.optim.lr_scheduler.LambdaLR`` takes them."""

from tilework.optim.schedules.cosine_warm_restarts import cosine_warm_restarts
from tilework.optim.schedules.warmup_polynomial import warmup_polynomial

__all__ = ["cosine_warm_restarts", "warmup_polynomial"]
