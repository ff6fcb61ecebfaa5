"""Loss, normalization and attention primitives for PyTorch: exact, drop-in, fast where it matters.

The families load when they are first used: ``tilework.losses``, ``tilework.norms``,
``tilework.attention``, ``tilework.optim``, ``tilework.quant``, ``tilework.decoding``.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilework import attention as attention
    from tilework import catalog as catalog
    from tilework import decoding as decoding
    from tilework import integrations as integrations
    from tilework import losses as losses
    from tilework import norms as norms
    from tilework import optim as optim
    from tilework import quant as quant

__version__ = "0.1.0"

FAMILIES = ("losses", "norms", "attention", "optim", "quant", "decoding")
_LAZY = (*FAMILIES, "catalog", "integrations")

__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
