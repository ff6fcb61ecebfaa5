"""The options of an optimizer, declared once as annotated fields.

A class with its options names them as a dataclass does, each with its check. The constructor, the
messages, ``defaults``, the groups and the ``state_dict`` are made from there::

    class Lion(DecoupledDecay, Optimizer):
        lr: float | Tensor = option(1e-4, rate)
        betas: tuple[float, float] = option((0.9, 0.99), decay_rates)

What follows a field ``_: KW_ONLY`` is keyword-only. In the class's docstring ``<shared>`` stands
for the options that it inherits. A check takes the name of the optimizer, that of the option and
what came; it raises, or returns what to keep.
"""

import dataclasses
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, dataclass_transform

import torch
from torch import Tensor

from tilework import _checks

Check = Callable[[str, str, Any], Any]

_SHARED = "        <shared>\n"  # in a docstring, stands for the options that have a meaning


def option(default: Any, check: Check, *, meaning: str = "") -> Any:
    """A field of an optimizer with its default and its check.

    Where several optimizers share it, its ``meaning`` stands in the docstring of each.
    """
    return dataclasses.field(default=default, metadata={"check": check, "meaning": meaning})


@dataclass_transform(eq_default=False, field_specifiers=(option, dataclasses.field))
class Declared:
    """Makes the annotated fields of a class its constructor's arguments."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclasses.dataclass(eq=False, repr=False, match_args=False)(cls)
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if field.name in vars(cls):
                delattr(cls, field.name)  # a default here would pass for the option's value
        if cls.__doc__ and _SHARED in cls.__doc__:
            cls.__doc__ = cls.__doc__.replace(_SHARED, _meanings(dataclasses.fields(cls)))  # type: ignore[arg-type]


def _meanings(fields: Iterable[dataclasses.Field[Any]]) -> str:
    shared = [(field.name, field.metadata.get("meaning")) for field in fields]
    return "".join(
        textwrap.fill(f"{name}: {meaning}", 100, initial_indent=" " * 8, subsequent_indent=" " * 12)
        + "\n"
        for name, meaning in shared
        if meaning
    )


def checks(cls: type[Any]) -> dict[str, Check]:
    """The check of each option of an optimizer."""
    return {
        field.name: field.metadata["check"]
        for field in dataclasses.fields(cls)
        if "check" in field.metadata
    }


def rate(optimizer: str, name: str, value: Any) -> float | Tensor:
    """A number of at least 0, or a tensor of one element, as schedules fill it in place."""
    accepted = "a number of at least 0 or a tensor of one element"
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise _checks.bad_value(optimizer, name, accepted, value)
        return value
    value = float(_checks.number(optimizer, name, value))
    if not value >= 0:
        raise _checks.bad_value(optimizer, name, accepted, value)
    return value


def non_negative(optimizer: str, name: str, value: Any) -> float:
    """A finite number of at least 0."""
    _checks.at_least(optimizer, name, value, 0)
    return float(value)


def finite(optimizer: str, name: str, value: Any) -> float:
    """A finite number."""
    _checks.finite(optimizer, name, value)
    return float(value)


def non_positive(optimizer: str, name: str, value: Any) -> float:
    """A finite number of at most 0."""
    _checks.finite(optimizer, name, value)
    if value > 0:
        raise _checks.bad_value(optimizer, name, "a number of at most 0", value)
    return float(value)


def positive(optimizer: str, name: str, value: Any) -> float:
    """A finite number above 0."""
    _checks.positive(optimizer, name, value)
    return float(value)


def fraction(optimizer: str, name: str, value: Any) -> float:
    """A number from 0 to 1."""
    _checks.fraction(optimizer, name, value)
    return float(value)


def decay_rate(optimizer: str, name: str, value: Any) -> float:
    """How much of a running mean each step keeps: from 0, and below 1."""
    value = float(_checks.number(optimizer, name, value))
    if not 0 <= value < 1:
        raise _checks.bad_value(optimizer, name, "a number of at least 0 and below 1", value)
    return value


def decay_rates(optimizer: str, name: str, value: Any) -> tuple[float, float]:
    """Two of these."""
    return pair(decay_rate)(optimizer, name, value)


def pair(check: Check) -> Check:
    """Two values, each of which passes a check."""

    def check_both(optimizer: str, name: str, value: Any) -> Any:
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise _checks.bad_value(optimizer, name, "two numbers", value)
        return tuple(check(optimizer, f"{name}[{index}]", part) for index, part in enumerate(value))

    return check_both


def optional(check: Check) -> Check:
    """None, or what passes a check."""
    return lambda optimizer, name, value: None if value is None else check(optimizer, name, value)


def one_of(*accepted: Any) -> Check:
    """One of some values."""

    def check(optimizer: str, name: str, value: Any) -> Any:
        _checks.one_of(optimizer, name, value, accepted)
        return value

    return check


def flag(optimizer: str, name: str, value: Any) -> bool:
    """True or False."""
    value = _checks.plain(value)
    if not isinstance(value, bool):
        raise _checks.bad_type(optimizer, name, "True or False", value)
    return value


def count(minimum: int) -> Check:
    """An int of at least a minimum."""

    def check(optimizer: str, name: str, value: Any) -> int:
        _checks.count(optimizer, name, value, minimum)
        return int(value)

    return check


def floating_dtype(optimizer: str, name: str, value: Any) -> torch.dtype:
    """A real floating dtype."""
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise _checks.bad_type(optimizer, name, "a floating dtype of torch or None", value)
    return value


def function(optimizer: str, name: str, value: Any) -> Any:
    """A callable."""
    if not callable(value):
        raise _checks.bad_type(optimizer, name, "a callable or None", value)
    return value
