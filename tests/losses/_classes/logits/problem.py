"""Statistics of logits as the operator gives them, and by their definition."""

from typing import Any

import torch
from torch import Tensor

from tilework.losses._classes.logits.common import LogitStats
from tilework.losses._classes.logits.operators import logit_stats
from tilework.losses._classes.statistics import Statistics

ROOMS = ("reference", "tiled", "triton")
DIFFERENTIABLE = ("total", "target_gap", "class_gap", "squares", "moment")


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    """Logits of shape (N, C) or (N, C, S)."""
    return (scale * torch.randn(shape)).to(dtype)


def draw_targets(input: Tensor, ignored: float = 0.2, ignore_index: int = -100) -> Tensor:
    """A class for each position, some of them ignored."""
    shape = input.shape[:1] + input.shape[2:]
    target = torch.randint(input.shape[1], shape)
    return target.masked_fill(torch.rand(shape) < ignored, ignore_index)


def measured(
    input: Tensor,
    target: Tensor,
    class_weight: Tensor | None = None,
    *,
    room: str,
    ignore_index: int = -100,
    squares: bool = True,
    moments: bool = True,
) -> Statistics:
    """What an implementation makes of the logits."""
    return logit_stats(
        LogitStats(input, target, class_weight, ignore_index, squares, moments, room)
    )


def definition(
    input: Tensor, target: Tensor, class_weight: Tensor | None = None, *, ignore_index: int = -100
) -> Statistics:
    """All statistics, with the classes last, in float32 for half precision.

    Total and moment have the values that torch's softmax gives them, which adds up classes that lie
    apart one after another, and the gradients of their definition, with a constant shift.
    """
    kept = target != ignore_index
    logits = input.to(torch.promote_types(input.dtype, torch.float32))
    logits = logits.where(kept.unsqueeze(1), 0)
    probabilities = logits.detach().softmax(1).movedim(1, -1)
    logits = logits.movedim(1, -1)
    classes = torch.arange(logits.shape[-1], device=input.device)
    is_target = classes == target[..., None]
    shift = logits.detach().amax(-1)
    away = shift[..., None] - logits
    finite = away.where(away < torch.inf, 0)
    exponentials = torch.exp(-away)
    total = 1 / probabilities.amax(-1)
    moment = (probabilities * finite.detach()).sum(-1) * total
    weight = torch.zeros(()) if class_weight is None else class_weight
    argmax = (logits.detach() == shift[..., None]).int().argmax(-1)
    found: dict[str, Any] = {
        "shift": shift,
        "total": _with_value(exponentials.sum(-1), total),
        "target_gap": away.where(is_target, 0).sum(-1).where(is_target.any(-1), torch.nan),
        "class_gap": (away * weight.to(away)).sum(-1),
        "squares": logits.where(~is_target, 0).square().sum(-1),
        "moment": _with_value((exponentials * finite).sum(-1), moment),
        "top": shift,
        "argmax": argmax,
    }
    return Statistics(
        **{name: values.where(kept, int(name == "total")) for name, values in found.items()}
    )


def _with_value(differentiable: Tensor, value: Tensor) -> Tensor:
    return differentiable + (value - differentiable.detach())
