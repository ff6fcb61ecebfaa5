"""Which paper each public name implements, and which implementations an operator has.

``tilework list``, ``tilework show NAME`` and the catalogue page of the docs are made from here.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import tilework

__all__ = ["Entry", "Paper", "entries", "find", "function_of", "implements", "without_paper"]

T = TypeVar("T")


@dataclass(frozen=True)
class Paper:
    """A publication: its title, the year of its first version, and its arXiv id when certain."""

    title: str
    year: int
    arxiv: str | None = None

    @property
    def url(self) -> str | None:
        """The paper's page on arXiv."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None


@dataclass(frozen=True)
class Entry:
    """A public object, with its paper or the reason why it has none."""

    object: Any
    paper: Paper | None
    reason: str | None

    @property
    def family(self) -> str:
        """The family whose namespace holds the object, such as ``"losses"``."""
        return str(self.object.__module__.split(".")[1])

    @property
    def name(self) -> str:
        """The name by which users import the object."""
        return f"tilework.{self.family}.{self.object.__name__}"

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return str((self.object.__doc__ or "").strip().partition("\n")[0])


_registry: list[Entry] = []


def implements(title: str, *, year: int, arxiv: str | None = None) -> Callable[[T], T]:
    """Register a public function or class under the paper that it implements.

    Args:
        title: The paper's title.
        year: The year of its first version.
        arxiv: Its arXiv identifier, when certain.

    Returns:
        A decorator that returns its argument unchanged.

    Example:
        >>> from tilework import catalog
        >>> catalog.find("losses.linear_cross_entropy").paper.arxiv
        '2411.09009'
    """
    return _register(Paper(title, year, arxiv), None)


def without_paper(reason: str) -> Callable[[T], T]:
    """Register a public name that no paper defines, with the reason why it is there."""
    return _register(None, reason)


def _register(paper: Paper | None, reason: str | None) -> Callable[[T], T]:
    def decorate(object_: T) -> T:
        _registry.append(Entry(object_, paper, reason))
        return object_

    return decorate


def entries() -> list[Entry]:
    """Import every family and return all public objects, by family and name."""
    for family in tilework.FAMILIES:
        importlib.import_module(f"tilework.{family}")
    order = {family: position for position, family in enumerate(tilework.FAMILIES)}
    return sorted(_registry, key=lambda entry: (order[entry.family], entry.name.lower()))


def find(name: str) -> Entry:
    """The entry of a public name: ``tilework.losses.f``, ``losses.f`` or ``f``.

    Raises:
        KeyError: No public name matches, or a bare name stands in two families.
    """
    found = [entry for entry in entries() if f".{entry.name}".endswith(f".{name}")]
    if len(found) != 1:
        names = ", ".join(entry.name for entry in found) or "none"
        raise KeyError(f"{name!r} must match one public name, matches: {names}")
    return found[0]


def function_of(object_: Any) -> Callable[..., Any] | None:
    """The public function whose options a class carries; None for anything that is no such twin.

    It is that of the class's name, with or without Loss. A layer, which makes parameters on a
    device, has more than the options of a function, and a tuple is a result.

    Example:
        >>> from tilework import catalog, losses
        >>> catalog.function_of(losses.SquentropyLoss).__name__
        'squentropy'
    """
    if not inspect.isclass(object_) or issubclass(object_, tuple):
        return None
    if "device" in inspect.signature(object_).parameters:
        return None
    name = object_.__name__.lower()
    functions = {
        entry.object.__name__.replace("_", ""): entry.object
        for entry in entries()
        if inspect.isfunction(entry.object)
    }
    return functions.get(name) or functions.get(name.removesuffix("loss"))
