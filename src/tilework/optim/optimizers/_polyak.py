"""What optimizers with a Polyak step size share: options, the cap, and the step of a group."""

from dataclasses import KW_ONLY
from typing import Any

from torch import Tensor

from tilework.optim._optimizer import (
    LossOptimizer,
    Numbers,
    decay_rate,
    finite,
    non_negative,
    option,
    rate,
)


class PolyakOptimizer(LossOptimizer):
    """Steps as long as the loss is above its bound, over a sum ``norm_sq`` that is measured."""

    lr: float | Tensor = option(0.1, rate)
    momentum: float = option(0.9, decay_rate)
    weight_decay: float = option(0.0, non_negative)
    _: KW_ONLY
    lower_bound: float = option(0.0, finite)

    _group_states = ("last_step_size",)

    @property
    def last_step_size(self) -> list[Tensor]:
        """The step size of each group in the last step, as tensors without dimensions."""
        return [group["last_step_size"].clone() for group in self.param_groups]

    def _polyak(self, numbers: Numbers) -> Tensor:
        """The step size before its bounds."""
        raise NotImplementedError

    def _measured(self, group: dict[str, Any], numbers: Numbers) -> dict[str, Any]:
        moves, lr = numbers["norm_sq"] != 0, numbers["lr"]
        size = self._polyak(numbers).clamp(max=lr).clamp(min=0).where(moves, lr)
        group["last_step_size"].copy_(size)
        return {"step_size": size.where(moves | size.isfinite(), 0.0)}  # inf * 0 would be nan

    def _decay(self, group: Numbers) -> Any:
        weight_decay = group["weight_decay"]
        if isinstance(weight_decay, float) and weight_decay == 0:
            return None
        return weight_decay * group["step_size"]
