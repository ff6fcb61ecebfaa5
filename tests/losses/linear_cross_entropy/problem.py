"""Problems for the tests of linear cross-entropy, and what torch makes of them."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import clones

IMPLEMENTATIONS = ("reference", "tiled", "chunked", "triton")


@dataclass
class Problem:
    """The tensors of one call, as leaves that require gradients, and its options."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def random(
        cls,
        tokens: int = 37,
        features: int = 19,
        classes: int = 101,
        dtype: torch.dtype = torch.float32,
        *,
        bias: bool = False,
        weight: bool = False,
        token_weight: bool = False,
        ignored: float = 0.2,
        scale: float = 1.0,
        **options: Any,
    ) -> "Problem":
        target = torch.randint(classes, (tokens,))
        target[torch.rand(tokens) < ignored] = options.get("ignore_index", -100)
        if weight:
            options["weight"] = torch.rand(classes)
        if token_weight:
            options["token_weight"] = torch.rand(tokens) + 0.1
        return cls(
            (scale * torch.randn(tokens, features)).to(dtype).requires_grad_(),
            torch.randn(classes, features).to(dtype).requires_grad_(),
            target,
            torch.randn(classes).to(dtype).requires_grad_() if bias else None,
            options,
        )

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.input, self.linear_weight, self.linear_bias) if t is not None]

    def to(self, dtype: torch.dtype) -> "Problem":
        input, linear_weight, linear_bias = clones(
            (self.input, self.linear_weight, self.linear_bias), dtype
        )
        assert input is not None
        assert linear_weight is not None
        options = {
            name: value.to(torch.promote_types(dtype, value.dtype))
            if isinstance(value, Tensor)
            else value
            for name, value in self.options.items()
        }
        return Problem(input, linear_weight, self.target, linear_bias, options)

    def on(self, device: str) -> "Problem":
        """The same problem on another device."""
        moved = [
            None if tensor is None else tensor.detach().to(device).requires_grad_()
            for tensor in (self.input, self.linear_weight, self.linear_bias)
        ]
        options = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        return Problem(moved[0], moved[1], self.target.to(device), moved[2], options)  # type: ignore[arg-type]

    def solve(self, function: Any, upstream: Tensor | None = None) -> list[Tensor]:
        """The loss and its gradients."""
        loss = function(
            self.input,
            self.linear_weight,
            self.target,
            linear_bias=self.linear_bias,
            **self.options,
        )
        seed = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
        return [loss, *torch.autograd.grad(loss, self.leaves, seed)]


def composed(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    shift: int = 0,
) -> Tensor:
    """The loss from torch's own parts; half-precision logits are upcast, as trainers do."""
    if shift:
        input, target = input[:, :-shift], target[:, shift:]
        token_weight = None if token_weight is None else token_weight[:, shift:]
    logits = F.linear(input, linear_weight, linear_bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits, flat = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    weight = None if weight is None else weight.to(logits.dtype)
    loss = F.cross_entropy(
        logits,
        flat,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    kept = flat != ignore_index
    loss = (loss + z_loss * logits.logsumexp(-1).square()).where(kept, 0)
    denominator = kept.to(logits.dtype)
    if token_weight is not None:
        denominator = denominator * token_weight.reshape(-1).to(logits.dtype)
        loss = loss * token_weight.reshape(-1).to(logits.dtype)
    if weight is not None:
        denominator = denominator * weight[flat.where(kept, 0)]
    if reduction == "none":
        return loss.reshape(target.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / denominator.sum()
