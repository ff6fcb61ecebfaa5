"""Schedules: functions of the step, as ``torch.optim.lr_scheduler.LambdaLR`` takes them."""

__all__: list[str] = []
