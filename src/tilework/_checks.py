"""Argument checks. Each message names the function, the argument, what came and what is accepted.

A check that reads values runs on plain CPU tensors only: elsewhere it would synchronize.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from tilework import _torch

REDUCTIONS = ("mean", "sum", "none")
POSITIVE_FRACTION = "a number above 0 and at most 1"


def describe(value: object) -> str:
    """What came, in the words of an error message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return repr(value)


def bad_value(function: str, argument: str, accepted: str, value: object) -> ValueError:
    """The error for a wrong value or shape."""
    return ValueError(f"{function}: {argument} must be {accepted}, got {describe(value)}")


def bad_type(function: str, argument: str, accepted: str, value: object) -> TypeError:
    """The error for a wrong type or dtype."""
    return TypeError(f"{function}: {argument} must be {accepted}, got {describe(value)}")


def one_of(function: str, argument: str, value: object, accepted: Iterable[object]) -> None:
    """Refuse a value that is not among the accepted ones."""
    accepted = tuple(accepted)
    if value not in accepted:
        raise bad_value(function, argument, "one of " + ", ".join(map(repr, accepted)), value)


def plain(value: Any) -> Any:
    """The number of Python that a scalar of NumPy stands for; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def number(function: str, argument: str, value: object) -> int | float:
    """The real number that came, one of NumPy as Python's; refuse anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, np.integer | np.floating):
        return int(value) if isinstance(value, np.integer) else float(value)
    raise bad_type(function, argument, "a number", value)


def finite(function: str, argument: str, value: object) -> None:
    """Refuse a number that is infinite or nan."""
    if not -math.inf < number(function, argument, value) < math.inf:
        raise bad_value(function, argument, "a finite number", value)


def at_least(function: str, argument: str, value: object, minimum: int | float) -> None:
    """Refuse a number below the minimum, infinite or nan."""
    if not minimum <= number(function, argument, value) < math.inf:
        raise bad_value(function, argument, f"a finite number of at least {minimum}", value)


def positive(function: str, argument: str, value: object) -> None:
    """Refuse a number that is not above zero, infinite or nan."""
    if not 0 < number(function, argument, value) < math.inf:
        raise bad_value(function, argument, "a finite number above 0", value)


def fraction(function: str, argument: str, value: object) -> None:
    """Refuse a number outside [0, 1]."""
    if not 0 <= number(function, argument, value) <= 1:
        raise bad_value(function, argument, "a number from 0 to 1", value)


def open_fraction(function: str, argument: str, value: object) -> None:
    """Refuse a number outside (0, 1)."""
    if not 0 < number(function, argument, value) < 1:
        raise bad_value(function, argument, "a number above 0 and below 1", value)


def positive_fraction(function: str, argument: str, value: object) -> None:
    """Refuse a number outside (0, 1]."""
    if not 0 < number(function, argument, value) <= 1:
        raise bad_value(function, argument, POSITIVE_FRACTION, value)


def fractions(function: str, argument: str, value: Tensor) -> Tensor:
    """Refuse a tensor with values outside [0, 1]; where looking is not free they become nan."""
    inside = (value >= 0) & (value <= 1)
    if holds_values(value):
        outside = value[~(inside | value.isnan())]
        if outside.numel():
            raise ValueError(
                f"{function}: {argument} must be from 0 to 1 everywhere, got {float(outside[0])}"
            )
    return value.where(inside, torch.nan)


def floating(function: str, argument: str, value: object) -> None:
    """Refuse what is not a tensor of a real floating dtype."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise bad_type(function, argument, "a floating-point tensor", value)


def has_values(tensor: Tensor) -> bool:
    """Whether values can be read: a plain tensor, neither traced nor batched, nor on meta."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type != "meta"
        and not torch.compiler.is_compiling()
        and not _torch.is_transformed(tensor)
        and not _torch.is_fake_mode()
    )


def holds_values(tensor: Tensor) -> bool:
    """Whether reading values is free, as on a CPU."""
    return tensor.device.type == "cpu" and has_values(tensor)


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, without importing what defines it."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def integer(function: str, argument: str, value: object) -> int:
    """The int that came, one of NumPy as Python's; refuse anything else."""
    if not _is_int(value):
        raise bad_type(function, argument, "an int", value)
    return int(value) if isinstance(value, np.integer) else value


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int | np.integer | torch.SymInt) and not isinstance(value, bool)


def count(function: str, argument: str, value: object, minimum: int = 1) -> None:
    """Refuse what is not an int of at least the minimum."""
    if integer(function, argument, value) < minimum:
        raise bad_value(function, argument, f"an int of at least {minimum}", value)


def shape(function: str, argument: str, value: Tensor, expected: Sequence[int]) -> None:
    """Refuse a tensor of another shape."""
    if tuple(value.shape) != tuple(expected):
        raise bad_value(function, argument, f"of shape {tuple(expected)}", value)


def constant(function: str, argument: str, value: Tensor, expected: Sequence[int]) -> None:
    """Refuse what is not a floating-point tensor of a shape, or would miss its gradient."""
    floating(function, argument, value)
    shape(function, argument, value, expected)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{function}: {argument} must not require a gradient: it is a constant here"
        )


def same_device(function: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that do not lie on the device of the first one."""
    (first, tensor), *others = [(name, t) for name, t in tensors.items() if t is not None]
    for name, other in others:
        if other.device != tensor.device:
            raise ValueError(
                f"{function}: {name} must lie on the device of {first}, {tensor.device}, "
                f"got {other.device}"
            )


def sizes(function: str, argument: str, value: object) -> tuple[int, ...]:
    """A size or a non-empty sequence of sizes as a tuple; refuse anything else."""
    result = tuple(value) if isinstance(value, Sequence) else (value,)
    accepted = "an int or a non-empty sequence of ints, each at least 0"
    if not all(map(_is_int, result)):
        raise bad_type(function, argument, accepted, value)
    if not result or any(size < 0 for size in result):
        raise bad_value(function, argument, accepted, value)
    return tuple(map(plain, result))
