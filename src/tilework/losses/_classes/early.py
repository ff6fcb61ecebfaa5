"""Gradients that are taken in the forward pass, where the coefficients of a sum are known."""

from collections.abc import Callable, Collection, Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from tilework import _checks, _operators, _torch

Name = TypeVar("Name", bound=Hashable)


def is_possible(*leaves: Tensor | None) -> bool:
    """Whether gradients can be taken before the loss is differentiated, and will be wanted.

    Not those of float16, which must be scaled before they are rounded.
    """
    return (
        torch.is_grad_enabled()
        and any(leaf is not None and leaf.requires_grad for leaf in leaves)
        and all(leaf is None or leaf.dtype != torch.float16 for leaf in leaves)
        and not _torch.transforms_are_active()
        and not _operators.only_reference()
    )


def hand_over(
    grad_loss: Tensor,
    gradients: Mapping[Name, Tensor],
    leaves: Mapping[Name, Tensor],
    loss: Callable[..., Tensor],
    needed: Collection[Name],
) -> Mapping[Name, Tensor | None]:
    """The gradients times that of the loss; where they are differentiated, by way of the loss."""
    if torch.is_grad_enabled():
        names = [name for name in leaves if name in needed]
        found = torch.autograd.grad(
            loss(), [leaves[name] for name in names], grad_loss, create_graph=True
        )
        return dict(zip(names, found, strict=True))
    return {name: _scaled(gradients[name], grad_loss) for name in gradients if name in needed}


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """The gradient times a number, in place where nobody will ask for it again."""
    if type(scale) is not Tensor or _torch.modes_are_active() or _torch.keeps_graph():
        return (gradient * scale).to(gradient.dtype)
    if _checks.holds_values(scale) and scale.item() == 1:
        return gradient
    return gradient.mul_(scale)
