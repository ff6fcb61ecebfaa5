"""What the tests of linear forms run on: losses of a linear head without its logits."""

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import samples
from calls import Call, Tensors, draw


def zeros() -> dict[str, Tensor]:
    """Three tokens and nine classes."""
    return {
        "input": torch.zeros(3, 4),
        "linear_weight": torch.zeros(9, 4),
        "target": torch.zeros(3, dtype=torch.int64),
    }


@dataclass(frozen=True)
class LinearForm(samples.Sample):
    """A linear form, and the definition of its loss, on rows of logits."""

    definition: Callable[..., Tensor]
    _: KW_ONLY
    accepts: dict[str, Any] = field(default_factory=zeros)
    weight: bool = False
    """Whether it takes class weights."""
    steps: bool = False
    """Whether rounded logits may change which positions count, under all options but the first."""

    @property
    def token_weight(self) -> bool:
        """Whether it takes weights of positions."""
        return "token_weight" in inspect.signature(self.function).parameters

    def composed(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        shift: int = 0,
        **options: Any,
    ) -> Tensor:
        """The loss from torch's own parts; half-precision logits are upcast, as trainers do."""
        if shift:
            input, target = input[:, :-shift], target[:, shift:]
            token_weight = None if token_weight is None else token_weight[:, shift:]
        logits = F.linear(input, linear_weight, linear_bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows, flat = logits.flatten(0, -2), target.flatten()
        if token_weight is None:
            losses = self.definition(rows, flat, **options)
            return losses.reshape(target.shape) if losses.dim() else losses
        reduction = options.pop("reduction", "mean")
        kept = target != options.get("ignore_index", -100)
        counts = token_weight.to(logits).where(kept, 0)
        losses = self.definition(rows, flat, reduction="none", **options).reshape(target.shape)
        losses = losses * counts
        if reduction != "mean":
            return losses if reduction == "none" else losses.sum()
        if options.get("weight") is not None:
            counts = counts * options["weight"][target.where(kept, 0)]
        return losses.sum() / counts.sum()


LINEAR_LEAVES = ("input", "linear_weight", "linear_bias")


def linear_tensors() -> Tensors:
    """Thirteen tokens, one in five ignored, for a head of seventeen classes."""
    target = torch.randint(17, (13,)).masked_fill(torch.rand(13) < 0.2, -100)
    return {
        "input": draw(13, 6),
        "linear_weight": draw(17, 6),
        "target": target,
        "linear_bias": draw(17),
    }


@samples.of(Call)
def calls() -> list[Call]:
    """A mean and single losses of every form."""
    return [
        Call(
            form.function,
            linear_tensors,
            differentiable=LINEAR_LEAVES,
            options=(form.options[0], form.options[-1] | {"reduction": "none"}),
        )
        for form in samples.collect(LinearForm)
    ]
