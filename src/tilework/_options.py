"""The options of a module or a callable, declared once as annotated fields.

A class with the options of a function names them as a dataclass does. Its constructor, the check at
construction, the call of the function and the repr are made from there::

    class SquentropyLoss(OptionsModule):
        weight: Tensor | None = buffer(default=None, kw_only=False)
        ignore_index: int = -100
        reduction: str = "mean"

        def _check(self) -> None:
            class_index.check_options("squentropy", **self.options())

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return squentropy(input, target, self.weight, **self.options())

A field is keyword-only unless it says ``kw_only=False``; ``dataclasses.field`` and ``InitVar`` mean
what they mean there. Type checkers read the same declaration. A :class:`StatefulModule` also
declares what it makes and moves itself.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, dataclass_transform

import torch
from torch import Tensor, nn

from tilework import _checks


def buffer(*, default: Any = dataclasses.MISSING, kw_only: bool = True, exact: bool = False) -> Any:
    """A field of an :class:`OptionsModule` that becomes a buffer: a tensor, or None for none.

    One of a :class:`StatefulModule` may be ``exact``: a cast of the module does not round it.
    """
    metadata = {"buffer": True, "exact": exact}
    return dataclasses.field(default=default, kw_only=kw_only, metadata=metadata)


def state(
    fresh: Callable[[Any], Tensor | None],
    *,
    persistent: bool = True,
    init: Literal[False] = False,
) -> Any:
    """A buffer that a :class:`StatefulModule` makes itself, from its options, by ``fresh``.

    One that is not ``persistent`` is not in the ``state_dict``, and made anew when one is loaded.
    """
    metadata = {"fresh": fresh, "persistent": persistent, "exact": True}
    return dataclasses.field(init=init, metadata=metadata)


@dataclass_transform(
    eq_default=False, kw_only_default=True, field_specifiers=(dataclasses.field, buffer, state)
)
class Options:
    """Makes the annotated fields of a class its constructor's arguments and its attributes."""

    _shown: ClassVar[tuple[dataclasses.Field[Any], ...]] = ()
    _passed: ClassVar[tuple[str, ...]] = ()
    _by_hand: ClassVar[bool] = False

    def __init_subclass__(cls, *, kw_only: bool = True) -> None:
        """Make the constructor; one that is written by hand is kept, and inherited."""
        super().__init_subclass__()
        cls._by_hand = cls._by_hand or "__init__" in vars(cls)
        if cls._by_hand:
            return
        dataclasses.dataclass(eq=False, repr=False, match_args=False, kw_only=kw_only)(cls)
        set_fields = cls.__init__
        arguments = set_fields.__annotations__
        for name, annotation in arguments.items():
            if isinstance(annotation, dataclasses.InitVar):
                arguments[name] = annotation.type
        for name in inspect.get_annotations(cls).keys() & arguments.keys() & vars(cls).keys():
            delattr(cls, name)  # a default here would hide a buffer or a submodule
        cls._shown = tuple(
            field
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
            if "buffer" not in field.metadata
            and (field.init or field.default is not dataclasses.MISSING)  # else a state, made later
        )
        cls._passed = tuple(field.name for field in cls._shown if field.kw_only)

        @functools.wraps(set_fields)
        def __init__(self: Options, *args: Any, **kwargs: Any) -> None:
            self._exist()
            options = {name: _checks.plain(value) for name, value in kwargs.items()}
            set_fields(self, *map(_checks.plain, args), **options)

        cls.__init__ = __init__  # type: ignore[assignment, method-assign]

    def _exist(self) -> None:
        """Do what comes before the fields are set."""

    def __post_init__(self) -> None:
        """Check the options, once they are set."""
        self._check()

    def _check(self) -> None:
        """Refuse options that the function would refuse."""

    def options(self) -> dict[str, Any]:
        """Return the keyword options of the function as they are now."""
        return {name: getattr(self, name) for name in self._passed}

    def extra_repr(self) -> str:
        """Return the options that are not their defaults."""
        return ", ".join(self._changed(self._shown))

    def _changed(self, declared: Iterable[dataclasses.Field[Any]]) -> list[str]:
        values = [(field, getattr(self, field.name)) for field in declared]
        return [
            f"{field.name}={value!r}"
            for field, value in values
            if not isinstance(value, nn.Module)  # which shows them itself
            and (isinstance(value, Tensor) or value != field.default)
        ]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class OptionsModule(Options, nn.Module):
    """The options of a module, some of which may be buffers."""

    __repr__ = nn.Module.__repr__

    def _exist(self) -> None:
        nn.Module.__init__(self)

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if "buffer" in field.metadata:
                value = getattr(self, field.name)
                delattr(self, field.name)  # may have become a parameter
                self.register_buffer(field.name, value)


def unround(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Give buffers that a cast went through the values back that it may have rounded."""
    for name, old in before.items():
        after = module._buffers[name]
        assert after is not None
        dtype = torch.promote_types(old.dtype, after.dtype)
        source = after if old.is_meta else old
        module._buffers[name] = source.to(after.device, dtype)


class StatefulModule(OptionsModule):
    """A module with states of its own, which :meth:`reset_parameters` makes anew.

    A cast of the module never rounds them, or a buffer that is ``exact``: it can only widen them.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in self._states():
            persistent = field.metadata["persistent"]
            self.register_buffer(field.name, field.metadata["fresh"](self), persistent=persistent)

    def reset_parameters(self) -> None:
        """Make the states as they were at first; tensors that were given stay as they are."""
        for field in self._states():
            self._renew(field)

    def _states(self) -> Iterator[dataclasses.Field[Any]]:
        declared = dataclasses.fields(self)  # type: ignore[arg-type]
        return (field for field in declared if "fresh" in field.metadata)

    def _renew(self, field: dataclasses.Field[Any]) -> None:
        old = self._buffers[field.name]
        with contextlib.nullcontext() if old is None else torch.device(old.device):
            fresh = field.metadata["fresh"](self)
        if old is not None and fresh is not None:
            fresh = fresh.to(old.dtype)
        setattr(self, field.name, fresh)

    def _move(self, came: Tensor, **states: Tensor) -> None:
        """Move running statistics; what is not finite, as it came or became, leaves all alone."""
        finite = torch.stack([t.isfinite().all() for t in (came, *states.values())]).all()
        for name, moved in states.items():
            old = getattr(self, name)
            old.copy_(moved.where(finite, old))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        exact = {
            field.name: value
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if field.metadata.get("exact") and (value := self._buffers[field.name]) is not None
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        unround(self, exact)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        for field in self._states():
            if not field.metadata["persistent"]:
                self._renew(field)
