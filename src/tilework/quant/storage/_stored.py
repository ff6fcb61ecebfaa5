"""Tensors and options as the fields of a dataclass: what every form of quantized weights is."""

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

AnyStored = TypeVar("AnyStored", bound="Stored")


@runtime_checkable
class Transform(Protocol):
    """What was done to weights before they were quantized."""

    def inverse(self, weight: Tensor) -> Tensor:
        """Undo it."""

    def to(self, device: torch.device | str) -> "Transform":
        """The same on a device."""


@dataclass(frozen=True, eq=False, repr=False)
class Stored:
    """Tensors and options that move between devices together; a tensor comes first."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it holds, by name; those of a transform apart."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return next(iter(self.tensors().values())).device

    def to(self: AnyStored, device: torch.device | str) -> AnyStored:
        """The same on a device.

        Args:
            device: Where its tensors are to lie.

        Returns:
            A copy.
        """
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        transform = getattr(self, "transform", None)
        if transform is not None:
            moved["transform"] = transform.to(device)
        return replace(self, **moved)
