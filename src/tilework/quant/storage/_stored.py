"""Tensors and options as the fields of a dataclass: what every form of quantized weights is."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from tilework.quant.storage.pack_codes import pack_codes, unpack_codes

AnyStored = TypeVar("AnyStored", bound="Stored")
PLAIN = (bool, int, float, str, tuple, torch.dtype, type(None))


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


class StoredWeights(Stored):
    """Weights of a layer in another form; ``codes``, if it has them, are of ``bits`` bits."""

    if TYPE_CHECKING:

        @property
        def shape(self) -> torch.Size:
            """Of the weights: (out, in); a field, or a property of its own."""

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights, in the dtype that they had or another one."""
        raise NotImplementedError

    @property
    def code_bits(self) -> int | float:
        """Bits of a code, for each weight that it stands for."""
        bits: int | float = self.bits  # type: ignore[attr-defined]
        return bits

    def limits(self) -> dict[str, int]:
        """The bounds of tensors of indices by name, which are kept in as few bytes as they need."""
        return {}

    def taken_apart(self) -> tuple[dict[str, Tensor], "Form"]:
        """Tensors as a layer or a file holds them, and the form that puts them together."""
        own, moved = self.tensors(), {}
        transform = getattr(self, "transform", None)
        if transform is not None:
            if not isinstance(transform, Stored):
                name = type(self).__name__
                raise TypeError(f"{name}: transform must be one of tilework.quant to be stored")
            moved = transform.tensors()
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        form = Form(
            kind=type(self),
            shape=self.shape,
            options={name: value for name, value in values.items() if isinstance(value, PLAIN)},
            tensors=tuple(own),
            indices=tuple(self.limits()),
            transform=None if transform is None else type(transform),
            moved=tuple(moved),
        )
        for name, limit in self.limits().items():
            own[name] = _narrowed(own[name], limit)
        if "codes" in own:
            packed = pack_codes(own.pop("codes"), self.bits)  # type: ignore[attr-defined]
            own = {"packed_codes": packed, **own}
        return {**own, **moved}, form


@dataclass(frozen=True)
class Form:
    """What tensors alone do not say of a value that they were taken from."""

    kind: type[StoredWeights]
    shape: torch.Size
    options: dict[str, Any]
    tensors: tuple[str, ...]
    indices: tuple[str, ...]
    transform: type[Stored] | None
    moved: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Whether it is of codes and grids of groups of columns, in order, and nothing else."""
        names = {"codes", "scale", "zero_point"}
        return set(self.tensors) == names and not self.moved and self.options["axis"] == "out"

    def put_together(self, tensors: Mapping[str, Tensor]) -> Any:
        """The value again; its tensors share memory with these where they can."""
        values: dict[str, Any] = dict(self.options)
        for name in self.tensors:
            if name == "codes":
                bits = values.get("bits") or self.kind.bits  # type: ignore[attr-defined]
                values[name] = unpack_codes(tensors["packed_codes"], bits, self.shape[1])
            elif name in self.indices:
                values[name] = _widened(tensors[name])
            else:
                values[name] = tensors[name]
        if self.transform is not None:
            values["transform"] = self.transform(**{name: tensors[name] for name in self.moved})
        return self.kind(**values)

    def __str__(self) -> str:
        options = (f"{name}={value}" for name, value in self.options.items() if value is not None)
        return ", ".join((self.kind.__name__, *options))


def _narrowed(indices: Tensor, limit: int) -> Tensor:
    """Numbers from 0 to below a limit in few bytes; as many as 16 bits hold are in an int16."""
    dtypes = {2**8: torch.uint8, 2**16: torch.int16, 2**31: torch.int32}
    return indices.to(next((dtype for most, dtype in dtypes.items() if limit <= most), torch.int64))


def _widened(indices: Tensor) -> Tensor:
    """The numbers again."""
    return indices.long() & 0xFFFF if indices.dtype == torch.int16 else indices.long()
