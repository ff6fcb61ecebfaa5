"""A model run on calibration batches, and what its layers get."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tilework import _checks
from tilework.quant.models._candidates import Candidate
from tilework.quant.statistics.hessian_accumulator import HessianAccumulator


class Rows:
    """The first rows that come, up to a number."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[Tensor] = []

    @property
    def count(self) -> int:
        """The number of rows kept."""
        return sum(map(len, self._parts))

    @property
    def is_full(self) -> bool:
        """Whether no more are needed."""
        return self.count >= self._limit

    def update(self, input: Tensor) -> None:
        """Keep rows of a batch as long as there is room."""
        rows = input.reshape(-1, input.shape[-1])[: self._limit - self.count]
        self._parts.append(rows.clone())

    @property
    def rows(self) -> Tensor:
        """All of them, of shape (n, in)."""
        return torch.cat(self._parts)


Statistics = HessianAccumulator | Rows
Watch = Callable[[str, Tensor], None]


class _Reached(BaseException):
    """The layers have got what they get of this batch; no handler of the model may stop it."""


def _run(model: nn.Module, batch: Any) -> None:
    with contextlib.suppress(_Reached):
        if isinstance(batch, Tensor):
            model(batch)
        elif isinstance(batch, Mapping):
            model(**batch)
        else:
            model(*batch)


def as_batches(name: str, calibration: Iterable[Any] | None) -> list[Any]:
    """Calibration as a list; refuse none, and what a model cannot be called with."""
    accepted = "an iterable of batches, each a tensor, a tuple, a list or a dict"
    if calibration is None:
        raise ValueError(f"{name}: calibration must be {accepted}, got None")
    if isinstance(calibration, Tensor | Mapping | str):
        raise _checks.bad_type(name, "calibration", accepted, calibration)
    result = list(calibration)
    if not result:
        raise ValueError(f"{name}: calibration must have at least one batch, got none")
    for batch in result:
        if not isinstance(batch, Tensor | tuple | list | Mapping):
            raise _checks.bad_type(name, "calibration", accepted, batch)
    return result


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients, compilation and training mode, which modules get back as they had it."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for name, module in model.named_modules():
            module.training = modes[name]


@contextlib.contextmanager
def _watching(layers: Iterable[Candidate], see: Watch) -> Iterator[None]:
    """Call a function with the name of a layer and its input before each call of the layer."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [
        one.layer.register_forward_pre_hook(hook_of(one.name), with_kwargs=True) for one in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Survey:
    """Which layers a model calls on which batch, how often, and with which tensors."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], layers: Iterable[Candidate]
    ) -> None:
        self._calls: dict[str, list[tuple[int, ...]]] = {}
        latest: Tensor | None = None
        version = token = 0
        current: dict[str, list[int]] = {}

        def see(name: str, input: Tensor) -> None:
            nonlocal latest, version, token
            now = 0 if input.is_inference() else input._version
            if input is not latest or now != version:
                latest, version, token = input, now, token + 1
            current.setdefault(name, []).append(token)

        with _watching(layers, see):
            for index, batch in enumerate(batches):
                current.clear()
                _run(model, batch)
                for name, tokens in current.items():
                    self._calls.setdefault(name, [() for _ in batches])[index] = tuple(tokens)

    def groups(self) -> Iterator[list[str]]:
        """The layers in the order of their first calls; neighbours with the same inputs together.

        Layers that get the very same tensors have the same statistics, whichever of them has been
        quantized before.
        """
        for _, group in itertools.groupby(self._calls, self._calls.__getitem__):
            yield list(group)

    def calls(self, name: str) -> int | None:
        """How often a layer is called on each batch; None where that is not always the same."""
        counts = {len(tokens) for tokens in self._calls[name]}
        return counts.pop() if len(counts) == 1 else None


def gather(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Iterable[Candidate],
    empty: Callable[[Candidate], Statistics],
    calls: int | None = None,
) -> dict[str, Statistics]:
    """The statistics of layers, in the order of their first calls.

    A batch is left when the layers have been called a number of times.
    """
    by_name = {one.name: one for one in layers}
    result: dict[str, Statistics] = {}
    seen = 0

    def see(name: str, input: Tensor) -> None:
        nonlocal seen
        if name not in result:
            result[name] = empty(by_name[name])
        result[name].update(input)
        seen += 1
        if seen == calls:
            raise _Reached

    with _watching(by_name.values(), see):
        for batch in batches:
            seen = 0
            _run(model, batch)
            if len(result) == len(by_name) and all(map(_is_full, result.values())):
                break
    return result


def _is_full(statistics: Statistics) -> bool:
    return isinstance(statistics, Rows) and statistics.is_full
