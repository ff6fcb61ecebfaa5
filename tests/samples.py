"""Tables of samples: what the tests of a whole kind of primitives run on.

A kind is what shared tests can treat alike: a loss, a linear form, an optimizer, a filter, a norm
layer, a quantizer, a policy. To add a kind:

1. ``tests/<family>/samples.py`` subclasses ``Sample`` with what its tests must know of a primitive
   beyond the function and its options: a definition, tensors to draw, a class, what does not hold::

       @dataclass(frozen=True)
       class Optimizer(samples.Sample):
           reference: Callable[..., tuple[Tensor, ...]]
           _: KW_ONLY
           sparse: bool = False

2. ``tests/<family>/test_every_<kind>.py`` asks for the table; every test runs on every sample, and
   those of ``refuses`` on every error case::

       @samples.every(Optimizer)
       def test_resumes(sample: Optimizer) -> None: ...

       @pytest.mark.untyped
       @samples.every_refusal(Optimizer)
       def test_refuses(sample: Optimizer, refusal: samples.Refusal) -> None:
           sample.check_refusal(refusal)

To add a primitive, its own test file registers its samples, and tests only what is peculiar to it::

    @samples.of(Optimizer)
    def table() -> list[Optimizer]:
        return [Optimizer(Lion, reference, refuses=(("lr must be", ValueError, {"lr": -1.0}),))]

All test files beside or below the file of the kind are looked at, whichever of them pytest runs.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from helpers import SEED

Refusal = tuple[str, type[Exception], dict[str, Any]]
"""The message after the name of the function, a pattern; its type; and the changed arguments."""
Refusals = tuple[Refusal, ...]


@dataclass(frozen=True)
class Sample:
    """One primitive, the options that its tests try, and what it refuses."""

    function: Callable[..., Any]
    _: KW_ONLY
    options: tuple[dict[str, Any], ...] = ({},)
    accepts: dict[str, Any] = field(default_factory=dict)
    """Arguments of a call that succeeds, of which each error case changes some."""
    refuses: Refusals = ()

    @property
    def name(self) -> str:
        return self.function.__name__

    def calls(self, change: Mapping[str, Any]) -> Iterable[Callable[[], Any]]:
        """What must refuse the change; a kind with modules adds theirs."""
        return [lambda: self.function(**(self.accepts | change))]

    def succeed(self) -> None:
        """Call it with what it accepts."""
        self.function(**self.accepts)

    def check_refusal(self, refusal: Refusal) -> None:
        """Hold every call to the message, and to success without the change."""
        message, error, change = refusal
        self.succeed()
        for call in self.calls(change):
            with pytest.raises(error, match=f"^{self.name}: {message}"):
                call()


Kind = TypeVar("Kind", bound=Sample)
Table = Callable[[], Iterable[Sample]]

_tables: dict[type[Sample], dict[str, Table]] = {}


def of(kind: type[Kind]) -> Callable[[Callable[[], list[Kind]]], Callable[[], list[Kind]]]:
    """Register a function that returns samples of a kind."""

    def register(table: Callable[[], list[Kind]]) -> Callable[[], list[Kind]]:
        _tables.setdefault(kind, {})[f"{table.__module__}.{table.__qualname__}"] = table
        return table

    return register


@cache
def collect(kind: type[Kind]) -> tuple[Kind, ...]:
    """The samples of all test files, in an order that does not depend on what pytest runs."""
    tests, folder = Path(__file__).parent, Path(inspect.getfile(kind)).parent
    for path in folder.rglob("test_*.py"):
        if not path.name.startswith("test_every_"):
            importlib.import_module(".".join(path.relative_to(tests).with_suffix("").parts))
    samples: list[Any] = []
    for _, table in sorted(_tables.get(kind, {}).items()):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(SEED)
            samples += table()
    return tuple(samples)


def every(
    kind: type[Kind], where: Callable[[Kind], bool] = lambda sample: True, *, name: str = "sample"
) -> pytest.MarkDecorator:
    """Run a test on every sample of a kind for which a condition holds."""
    chosen = [sample for sample in collect(kind) if where(sample)]
    return pytest.mark.parametrize(name, chosen, ids=lambda sample: sample.name)


def every_refusal(kind: type[Kind]) -> pytest.MarkDecorator:
    """Run a test on every ``sample`` of a kind with every ``refusal`` of its table."""
    cases = [(sample, refusal) for sample in collect(kind) for refusal in sample.refuses]
    names = [f"{sample.name}-{message}" for sample, (message, *_) in cases]
    return pytest.mark.parametrize(("sample", "refusal"), cases, ids=names)
