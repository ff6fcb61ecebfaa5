"""How much of a gradient its filter keeps, noted for those who want to know."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_notes: list[list[tuple[int, int]]] = []


@contextmanager
def noted() -> Iterator[list[tuple[int, int]]]:
    """A list of what every filter inside keeps, in classes or tiles, and of how many."""
    _notes.append([])
    try:
        yield _notes[-1]
    finally:
        _notes.pop()


def note(share: Callable[[], tuple[int, int]]) -> None:
    """Add to the list if there is one; only then are they counted."""
    if _notes:
        _notes[-1].append(share())
