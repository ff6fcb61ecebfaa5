"""Problems for the tests of the divergence between linear heads, and what torch makes of them."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import clones

IMPLEMENTATIONS = ("reference", "tiled", "triton")
DIVERGENCES = ("forward", "reverse", "jsd")


@dataclass
class Problem:
    """The tensors of one call, the student's as leaves that require gradients, and its options."""

    student_input: Tensor
    student_weight: Tensor
    teacher_input: Tensor
    teacher_weight: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def random(
        cls,
        tokens: int = 45,
        features: int = 19,
        classes: int = 101,
        dtype: torch.dtype = torch.float32,
        *,
        teacher_features: int = 11,
        bias: bool = False,
        mask: float = 0.8,
        token_weight: bool = False,
        **options: Any,
    ) -> "Problem":
        if mask < 1:
            options["mask"] = torch.rand(tokens) < mask
        if token_weight:
            options["token_weight"] = torch.rand(tokens) + 0.1

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape).to(dtype)

        return cls(
            normal(tokens, features).requires_grad_(),
            normal(classes, features).requires_grad_(),
            normal(tokens, teacher_features),
            normal(classes, teacher_features),
            normal(classes).requires_grad_() if bias else None,
            normal(classes) if bias else None,
            options,
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (
            *(self.student_input, self.student_weight, self.teacher_input, self.teacher_weight),
            *(self.student_bias, self.teacher_bias),
        )

    @property
    def leaves(self) -> list[Tensor]:
        student = (self.student_input, self.student_weight, self.student_bias)
        return [tensor for tensor in student if tensor is not None]

    def to(self, dtype: torch.dtype) -> "Problem":
        options = {
            name: value.to(torch.promote_types(dtype, value.dtype))
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in self.options.items()
        }
        return Problem(*clones(self.tensors, dtype), options)  # type: ignore[arg-type]

    def on(self, device: str) -> "Problem":
        """The same problem on another device."""

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.detach().to(device).requires_grad_(value.requires_grad)

        options = {name: move(value) for name, value in self.options.items()}
        return Problem(*map(move, self.tensors), options)

    def with_options(self, **options: Any) -> "Problem":
        return replace(self, options={**self.options, **options})

    def loss(self, function: Any) -> Tensor:
        loss: Tensor = function(
            *self.tensors[:4],
            student_bias=self.student_bias,
            teacher_bias=self.teacher_bias,
            **self.options,
        )
        return loss

    def solve(self, function: Any, upstream: Tensor | None = None) -> list[Tensor]:
        """The loss and its gradients."""
        loss = self.loss(function)
        seed = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
        return [loss, *torch.autograd.grad(loss, self.leaves, seed)]


def composed(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss from torch's own parts; half-precision logits are upcast, as trainers do."""

    def log_probabilities(input: Tensor, weight: Tensor, bias: Any, cap: float | None) -> Tensor:
        logits = F.linear(input, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return F.log_softmax(logits / temperature, -1)

    log_p = log_probabilities(student_input, student_weight, student_bias, student_softcap)
    with torch.no_grad():
        log_q = log_probabilities(teacher_input, teacher_weight, teacher_bias, teacher_softcap)
    if divergence == "forward":
        loss = kl_div(log_q, log_p)
    elif divergence == "reverse":
        loss = kl_div(log_p, log_q)
    else:
        parts = torch.stack((log_q + math.log(beta), log_p + math.log1p(-beta)))
        log_m = parts.where((parts > -torch.inf).any(0), 0).logsumexp(0)
        loss = beta * kl_div(log_q, log_m) + (1 - beta) * kl_div(log_p, log_m)
    scale = torch.ones_like(loss) if token_weight is None else token_weight.to(loss.dtype)
    if mask is not None:
        scale, loss = scale.where(mask, 0), loss.where(mask, 0)
    loss = loss * scale
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / scale.sum()


def kl_div(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) of rows by ``F.kl_div``, which makes nan of impossible classes: they are left out."""
    possible = log_p > -torch.inf
    terms = F.kl_div(
        log_q.where(possible, 0), log_p.where(possible, 0), reduction="none", log_target=True
    )
    return terms.where(possible, 0).sum(-1)
