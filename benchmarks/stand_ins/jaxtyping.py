"""Stands in for jaxtyping where it is not installed, as on a GPU machine without a network.

Shapes in annotations then say nothing. ``make gpu`` puts this folder on the path.
"""

from typing import Any


class _Shaped:
    def __class_getitem__(cls, item: Any) -> Any:
        return item[0]


def __getattr__(name: str) -> Any:
    if not name[0].isupper():
        raise AttributeError(f"no {name} stands in for that of jaxtyping")
    return _Shaped
