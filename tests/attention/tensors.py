"""Tensors of attention for the tests that run over all functions."""

from typing import Any

from tilework.attention import attention_lse

from calls import Tensors, draw

GROUPS = {4: 8, 2: 4}
"""The heads keep their groups in a larger problem."""


def heads(*names: str, queries: int = 9, keys: int = 11) -> Tensors:
    """Queries of four heads, and keys and values of two."""
    shapes = {"query": (3, 4, queries, 6), "key": (3, 2, keys, 6), "value": (3, 2, keys, 5)}
    return {name: draw(*shapes[name]) for name in names}


def with_lse(tensors: Tensors, **options: Any) -> Tensors:
    """Queries and keys with their log-sum-exp."""
    return tensors | {"lse": attention_lse(**tensors, enable_gqa=True, **options)}
