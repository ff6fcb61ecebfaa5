"""Small helpers shared by kernels: block sizes by architecture, and exact elementary functions."""

import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter on the CPU."""


class Config(NamedTuple):
    """Block sizes of a product's kernel, and the warps and pipeline stages of a program."""

    block_rows: int
    block_columns: int
    block_inner: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        """What a launch takes, under the names that the kernels use."""
        return {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_COLUMNS": self.block_columns,
            "BLOCK_INNER": self.block_inner,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class Place(NamedTuple):
    """What an entry is for; ``size`` is one of the kernel's own, such as its features."""

    arch: str
    dtype: torch.dtype | None = None
    size: int = 0


E = TypeVar("E", bound=tuple[int, ...])
_ANY_SIZE = sys.maxsize


class Tuned(Generic[E]):
    """The block sizes of a kernel by architecture, which ``tilework tune`` measures.

    An entry is a named tuple, whose fields are the axes of the search.

    Args:
        table: An entry for each architecture, such as ``"sm_90"``, or entries by the largest size
            that they are for, in ascending order. Numbers of 32 bits, which take more registers,
            have theirs under ``"sm_90 float32"`` or, for all other architectures, ``"float32"``.
            That of ``"interpreter"`` is for every dtype.
        otherwise: The key of what architectures have that are not in the table.
    """

    def __init__(self, table: Mapping[str, E | Mapping[int, E]], *, otherwise: str) -> None:
        self.otherwise = otherwise
        self.table: dict[str, Mapping[int, E]] = {
            key: {_ANY_SIZE: entries} if isinstance(entries, tuple) else entries
            for key, entries in table.items()
        }
        self._chosen: dict[tuple[str, torch.dtype | None, int], E] = {}
        self._override: E | None = None
        self._asked: list[Place] | None = None

    def __or__(self, others: Mapping[str, E | Mapping[int, E]]) -> "Tuned[E]":
        """This table with other entries for some architectures."""
        return Tuned({**self.table, **others}, otherwise=self.otherwise)

    def choose(self, arch: str, dtype: torch.dtype | None = None, size: int = 0) -> E:
        """The entry for an architecture, a dtype and a size."""
        if self._asked is not None:
            self._asked.append(Place(arch, dtype, size))
        if self._override is not None:
            return self._override
        place = arch, dtype, size
        if place not in self._chosen:
            entries = self._entries(arch, dtype).items()
            self._chosen[place] = next(entry for most, entry in entries if size <= most)
        return self._chosen[place]

    @contextmanager
    def override(self, entry: E) -> Iterator[None]:
        """Use an entry in place of all that stand in the table."""
        before, self._override = self._override, entry
        try:
            yield
        finally:
            self._override = before

    @contextmanager
    def asked(self) -> Iterator[list[Place]]:
        """Note what entries are asked for."""
        before, self._asked = self._asked, []
        try:
            yield self._asked
        finally:
            self._asked = before

    def line(self, place: Place, entry: E) -> str:
        """The line of the table that has an entry for a place; other sizes keep theirs."""
        key, _ = self._keys(place.arch, place.dtype)
        entries = self._entries(place.arch, place.dtype)
        if _ANY_SIZE in entries:
            return f'"{key}": {entry!r},'
        by_size = sorted({**entries, place.size: entry}.items())
        return f'"{key}": {{{", ".join(f"{most}: {one!r}" for most, one in by_size)}}},'

    def _entries(self, arch: str, dtype: torch.dtype | None) -> Mapping[int, E]:
        own, shared = self._keys(arch, dtype)
        found = self.table.get(own) or self.table.get(shared)
        if found is None:
            raise LookupError(
                f"block sizes for {dtype} on {arch}: the table must have {own!r} or {shared!r}, "
                f"it has {', '.join(map(repr, self.table))}"
            )
        return found

    def _keys(self, arch: str, dtype: torch.dtype | None) -> tuple[str, str]:
        """Where the entry of an architecture stands, and where that of those without one."""
        if dtype is None or dtype.itemsize < 4:
            return arch, self.otherwise
        return arch if arch == "interpreter" else f"{arch} float32", "float32"


@functools.cache
def architecture(device: torch.device) -> str:
    """Such as ``sm_90`` or ``gfx942``; ``interpreter`` for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many run programs at the same time; 2 for the CPU, so that tests have several."""
    if device.type != "cuda":
        return 2
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """``total + left @ right``."""
    if INTERPRETED:
        # The interpreter multiplies the bits of bfloat16 as integers.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32, within a few rounding units also near zero."""
    size = tl.abs(x)
    decay = tl.exp(-2 * size)
    square = x * x
    series = size * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    result = tl.where(size < 0.2, series, (1 - decay) / (1 + decay))
    return tl.where(x < 0, -result, result)


@triton.jit
def expm1(x):
    """``exp(x) - 1`` in float32, within a few rounding units also near zero."""
    series = 1 + x / 7 * (1 + x / 8 * (1 + x / 9))
    series = 1 + x / 4 * (1 + x / 5 * (1 + x / 6 * series))
    series = x * (1 + x / 2 * (1 + x / 3 * series))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """``log(1 + x)`` in float32, within a few rounding units also near zero."""
    ratio = x / (2 + x)
    square = ratio * ratio
    series = 1 / 7 + square * (1 / 9 + square * (1 / 11 + square * (1 / 13)))
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * series))
    return tl.where(tl.abs(x) < 0.5, 2 * ratio * series, tl.log(1 + x))
