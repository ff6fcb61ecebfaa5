"""What a suite declares. Each module of this package is one suite, and holds it as ``SUITE``.

A new suite is a new file: the runner, the commands and the plots learn all they need from it.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tilework import _implementations

Inputs = dict[str, Tensor]
Results = dict[str, Tensor]


INSTALL = {
    "flash-linear-attention": "pip install 'tilework[peers-gpu]'",
    "quack-kernels": "pip install 'tilework[peers-gpu]'",
    "flash-attn": "pip install flash-attn --no-build-isolation, with CUDA's compiler",
}
"""How to install the packages that a plain ``pip install`` is not enough for or too much."""


class Unavailable(Exception):
    """A candidate cannot run here. The message says why, and becomes the row's reason."""


@dataclass(frozen=True)
class Case:
    """One problem: what is done, at which sizes and in which dtypes."""

    kind: str
    sizes: Mapping[str, int]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    quick: bool = False

    @property
    def name(self) -> str:
        """The case in one line, such as ``forward N=2048 D=768 V=50304``."""
        return " ".join([self.kind, *(f"{name}={size}" for name, size in self.sizes.items())])


@dataclass(frozen=True)
class Growth:
    """Cases in which work grows by two orders of magnitude, for the page on scaling.

    Attributes:
        over: The size that grows.
        cases: The cases, smallest first.
    """

    over: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Step:
    """A candidate bound to the inputs of a case.

    Attributes:
        run: Does the work once and returns the results that the truth is compared with.
        kernel: What runs underneath, as exactly as it can be told.
        default: Whether Tilework picks this implementation by itself for these inputs.
        facts: What else the suite wants to have in the row, such as a gradient's tile keep rate.
    """

    run: Callable[[], Results]
    kernel: str
    default: bool = False
    facts: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """An implementation of Tilework, or a peer.

    Attributes:
        name: The name in tables, unique in the suite.
        build: Binds the candidate to a case's inputs; raises :class:`Unavailable` where it cannot.
        peer: Whether it is somebody else's code.
        package: The module that it imports besides torch.
        distribution: What to install to get that module.
        devices: The device types it runs on; () stands for every one.
        dtypes: The dtypes in which it is a candidate of its own; () stands for every one.
    """

    name: str
    build: Callable[[Case, Inputs], Step]
    peer: bool = True
    package: str | None = None
    distribution: str | None = None
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()

    def bind(self, case: Case, inputs: Inputs) -> Step:
        """Build the step.

        Raises:
            Unavailable: The candidate cannot run here.
        """
        device = next(iter(inputs.values())).device.type
        if self.devices and device not in self.devices:
            raise Unavailable(f"it runs on {', '.join(self.devices)}, not on {device}")
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            how = INSTALL.get(self.distribution or "", f"pip install {self.distribution}")
            raise Unavailable(f"the package {self.distribution} is not installed: {how}")
        return self.build(case, inputs)


@dataclass(frozen=True)
class Suite:
    """The cases, candidates, truth and costs of one primitive.

    Attributes:
        module: The ``__name__`` of the suite's module; its last part is the suite's name.
        about: One line.
        cases: The cases for a device type, the most important first.
        inputs: Makes a case's inputs, the same ones on every call.
        candidates: Everything that is measured.
        composition: The candidate that is torch's plain composition. Its error is the yardstick.
        truth: The results in float64, computed independently of all candidates.
        flops: The operations that the definition needs. Work done twice does not count.
        products: Whether these are matrix products; elementwise ones are done in float32.
        traffic: The bytes that any implementation must move: inputs once, results once.
        rank: Its place among the suites; the lower, the more important.
        growth: The series of the page on scaling.
        compared: What of the results is compared with the truth; not timed.
    """

    module: str
    about: str
    cases: Callable[[str], Sequence[Case]]
    inputs: Callable[[Case, torch.dtype, torch.device], Inputs]
    candidates: tuple[Candidate, ...]
    composition: str
    truth: Callable[[Case, Inputs], Results]
    flops: Callable[[Case], int]
    products: bool
    traffic: Callable[[Case, torch.dtype], int]
    rank: int = 9
    growth: tuple[Growth, ...] = ()
    compared: Callable[[Results], Results] = lambda results: results

    @property
    def name(self) -> str:
        """The name on the command line."""
        return self.module.rpartition(".")[2]


def load(module: str) -> Suite:
    """The suite that a module holds."""
    suite = importlib.import_module(module).SUITE
    assert isinstance(suite, Suite)
    return suite


def discover() -> dict[str, Suite]:
    """All suites of this package by name, the most important first."""
    found = [load(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {suite.name: suite for suite in sorted(found, key=lambda one: (one.rank, one.name))}


def implementations(
    operator: str,
    call: Callable[[Case, Inputs, str], Callable[[], Results]],
    given: Callable[[Case, Inputs], Mapping[str, Any]] = lambda case, inputs: {},
) -> tuple[Candidate, ...]:
    """The candidates that stand in an operator's table of implementations.

    Args:
        operator: The key in ``tilework._implementations.TABLES``.
        call: Binds the implementation of that name.
        given: What the choice of one depends on besides the first floating-point tensor.
    """
    table = _implementations.TABLES[operator]

    def candidate(entry: _implementations.Implementation) -> Candidate:
        def build(case: Case, inputs: Inputs) -> Step:
            tensor = next(tensor for tensor in inputs.values() if tensor.is_floating_point())
            rest = given(case, inputs)
            reason = _implementations.refusal(entry, (tensor,), rest)
            if reason is not None:
                raise Unavailable(reason)
            chosen = _implementations.choose(operator, table, None, tensor, **rest)
            return Step(
                call(case, inputs, entry.name),
                f"tilework {operator} {entry.name}",
                chosen == entry.name,
            )

        # The devices are checked here too: Triton's interpreter would be timed otherwise.
        return Candidate(f"tilework {entry.name}", build, peer=False, devices=entry.devices)

    return tuple(candidate(entry) for entry in table)


def by_kind(candidates: Mapping[str, tuple[Candidate, ...]]) -> tuple[Candidate, ...]:
    """The candidates of several operators, each the operator of one kind of cases.

    Their tables must have implementations of the same names and devices.
    """

    def candidate(alike: Mapping[str, Candidate]) -> Candidate:
        def build(case: Case, inputs: Inputs) -> Step:
            return alike[case.kind].build(case, inputs)

        (common,) = {replace(one, build=build) for one in alike.values()}
        return common

    columns = zip(*candidates.values(), strict=True)
    return tuple(candidate(dict(zip(candidates, column, strict=True))) for column in columns)


def loss_and_gradients(
    loss: Callable[[], Tensor], inputs: Mapping[str, Tensor]
) -> Callable[[], Results]:
    """A run that computes a scalar loss, and its gradients by all inputs that require one."""
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}

    def forward() -> Results:
        with torch.no_grad():
            return {"loss": loss()}

    def forward_and_backward() -> Results:
        value = loss()
        gradients: Sequence[Any] = torch.autograd.grad(value, list(leaves.values()))
        named = zip((f"grad {name}" for name in leaves), gradients, strict=True)
        return {"loss": value.detach(), **dict(named)}

    return forward_and_backward if leaves else forward
