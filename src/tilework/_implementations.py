"""The implementations of a primitive: what each takes, and which of them a call gets.

A primitive's table says both, in the order of preference; :func:`choose` reads it at each call,
``tilework doctor``, the docs and the bench print it or ask :func:`choose` too.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tilework import _checks

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Implementation:
    """What one implementation of a primitive supports; as usual in plain PyTorch if not said.

    ``refuses`` tells why it does not take a call, if so, and ``prefers`` whether a call that it
    takes is better off with it than with what follows in the table. Both get what :func:`choose`
    is given: the tensors, and the rest by name.
    """

    name: str
    memory: str
    devices: tuple[str, ...] = ()  # () stands for every device
    dtypes: tuple[torch.dtype, ...] = FLOATING
    backward: str = "first order; higher orders and forward mode by the reference"
    deterministic: bool = True
    needs: str | None = None  # a package
    checked_on: str = "CPU"  # where its numbers were compared with float64
    refuses: Callable[..., str | None] | None = None
    prefers: Callable[..., bool] | None = None
    when: str = ""  # what it takes and what it is preferred for, in words
    installed: bool = field(init=False)

    def __post_init__(self) -> None:
        if (self.refuses is None and self.prefers is None) != (not self.when):
            raise ValueError(f"{self.name}: what it refuses or prefers must come with when")
        # Once, as a look for a package takes longer than a call of a small operator.
        found = self.needs is None or importlib.util.find_spec(self.needs) is not None
        object.__setattr__(self, "installed", found)

    @classmethod
    def triton(cls, memory: str, **differences: Any) -> "Implementation":
        """Kernels, with what differs from the usual ones."""
        usual: dict[str, Any] = {
            "devices": ("cuda",),
            "dtypes": (torch.float16, torch.bfloat16, torch.float32),
            "needs": "triton",
            "checked_on": "Triton's interpreter",
        }
        return cls("triton", memory, **usual | differences)

    @classmethod
    def reference(cls, memory: str, *, backward: str = "every order and mode") -> "Implementation":
        """The definition."""
        return cls("reference", memory, backward=backward)


Table = Sequence[Implementation]
TABLES: dict[str, Table] = {}
"""The implementations by public name, ``family.function``, the preferred one first."""


def shared() -> list[tuple[list[str], Table]]:
    """Each table, after the names that share it."""
    names: dict[int, list[str]] = {}
    for name, table in TABLES.items():
        names.setdefault(id(table), []).append(name)
    return [(some, TABLES[some[0]]) for some in names.values()]


def find(name: str) -> str | None:
    """The key of the table of a public name, which for a module is that of its function."""
    family, _, last = name.removeprefix("tilework.").partition(".")
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", last).lower()
    keys = (f"{family}.{one}" for one in (last, words, words.removesuffix("_loss")))
    return next((key for key in keys if key in TABLES), None)


def check_name(function: str, table: Table, name: str | None) -> None:
    """Refuse the name of an implementation that does not exist."""
    if name is not None:
        _checks.one_of(function, "implementation", name, [entry.name for entry in table])


def missing(entry: Implementation) -> str | None:
    """Why an implementation cannot run here at all, if it cannot."""
    return None if entry.installed else f"the package {entry.needs} is not installed"


def unfit(entry: Implementation, tensor: Tensor) -> str | None:
    """Why an implementation does not take tensors like this one, if it does not."""
    if tensor.dtype not in entry.dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in entry.dtypes)
        return f"it takes {accepted}, not {_checks.describe(tensor)}"
    if entry.devices and tensor.device.type not in entry.devices and not _interpreted(entry):
        return f"it runs on {', '.join(entry.devices)}, not on {tensor.device.type}"
    return missing(entry)


def refusal(
    entry: Implementation, tensors: Sequence[Tensor], given: Mapping[str, Any]
) -> str | None:
    """Why an implementation does not take a call, if it does not."""
    for tensor in tensors:
        reason = unfit(entry, tensor)
        if reason is not None:
            return reason
    return None if entry.refuses is None else entry.refuses(*tensors, **given)


def choose(function: str, table: Table, name: str | None, *tensors: Tensor, **given: Any) -> str:
    """The named implementation, which must take the call; or the first that is preferred for it.

    ``tensors`` are those whose dtype and device count; ``given`` is what else the entries ask for.
    """
    if name is not None:
        check_name(function, table, name)
        why = refusal(next(entry for entry in table if entry.name == name), tensors, given)
        if why is not None:
            raise ValueError(f"{function}: implementation={name!r} cannot be used: {why}")
        return name
    device = tensors[0].device.type
    for entry in table:
        if (
            _made_for(entry, device)
            and refusal(entry, tensors, given) is None
            and (entry.prefers is None or entry.prefers(*tensors, **given))
        ):
            return entry.name
    reasons = "; ".join(
        f"{entry.name}: {refusal(entry, tensors, given) or entry.when}" for entry in table
    )
    raise TypeError(f"{function}: no implementation takes these tensors ({reasons})")


def defaults(table: Table, tensor: Tensor) -> list[str]:
    """Those that calls with such a tensor get, as far as the tensor tells."""
    names = []
    for entry in table:
        if _made_for(entry, tensor.device.type) and unfit(entry, tensor) is None:
            names.append(entry.name)
            if not entry.when:
                break
    return names


def _made_for(entry: Implementation, device: str) -> bool:
    return not entry.devices or device in entry.devices


def _interpreted(entry: Implementation) -> bool:
    return entry.needs == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
