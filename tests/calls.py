"""A call of every public function of tensors, for the tests that run over all of them.

The samples of losses and of linear forms are calls already. The test file of any other function
registers its own, tiny and with sizes that differ where they stand for different things::

    @samples.of(Call)
    def calls() -> list[Call]:
        return [Call(rms_norm, lambda: {"input": draw(5, 6), "weight": draw(6)},
                     differentiable=("input", "weight"), options=({"normalized_shape": 6},),
                     sizes={6: 6})]

A test asks for ``every_call``, and gets calls with one set of options each::

    @calls.every_call
    def test_something(call: Call) -> None:
        tensors = call.draw()
        result = call.run(**tensors)
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache, partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tilework import _implementations, catalog

import samples

Tensors = dict[str, Any]
"""Tensor arguments by name; lists of tensors too."""


def draw(*shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64)


@dataclass(frozen=True)
class Call(samples.Sample):
    """One call of a public function: how its tensors are drawn, and what holds for them."""

    tensors: Callable[[], Tensors]
    """Draws the tensor arguments; floating ones in float64."""
    _: KW_ONLY
    by: Callable[..., Any] | None = None
    """Calls the function, where it takes what is no tensor, such as a layout, made in here."""
    differentiable: tuple[str, ...] = ()
    """Arguments that take gradients."""
    statistics: tuple[str, ...] = ()
    """Arguments that are float32 where the others are of half precision."""
    sizes: Mapping[int, int] = field(default_factory=dict)
    """What a size becomes in a larger problem, if not twice itself and one; itself, where the
    docstring fixes it."""

    @property
    def label(self) -> str:
        """The name with what tells the call from others."""
        options = (f"{name}={value}" for name, value in self.options[0].items())
        return "-".join((self.name, *options))

    def draw(self, dtype: torch.dtype = torch.float64) -> Tensors:
        """Tensors of a dtype, of which the differentiable ones require gradients."""
        return self.leaves(self.tensors(), dtype)

    def draw_larger(self, dtype: torch.dtype = torch.float64) -> Tensors:
        """The same problem with every size that the docstring does not fix enlarged."""
        return self.leaves(tree_map_only(Tensor, self.enlarged, self.tensors()), dtype)

    def run(self, **tensors: Any) -> Any:
        """Call the function."""
        return (self.by or self.function)(**tensors, **self.options[0])

    def of_implementations(self) -> Iterator["Call"]:
        """The call by default and by each implementation of the function."""
        yield self
        if "implementation" in inspect.signature(self.function).parameters:
            name = catalog.find(self.name).name.removeprefix("tilework.")
            for entry in _implementations.TABLES[name]:
                options = self.options[0] | {"implementation": entry.name}
                yield replace(self, options=(options,))

    def size(self, size: int) -> int:
        """What a size becomes in a larger problem."""
        return self.sizes.get(size, 2 * size + 1)

    def is_open(self, tensor: Tensor, dim: int) -> bool:
        """Whether the docstring leaves the size of a dimension open."""
        return self.size(tensor.shape[dim]) != tensor.shape[dim]

    def enlarged(self, tensor: Tensor) -> Tensor:
        """A tensor with more elements, between its own ones, or equal to them if integer."""
        for dim, size in enumerate(tensor.shape):
            places = torch.linspace(0, size - 1, self.size(size), dtype=torch.float64)
            before = tensor.index_select(dim, places.floor().long())
            if not tensor.is_floating_point():
                tensor = before
                continue
            after = tensor.index_select(dim, places.ceil().long())
            part = (places % 1).to(tensor.dtype).reshape(-1, *[1] * (tensor.dim() - dim - 1))
            tensor = before.lerp(after, part)
        return tensor

    def leaves(self, tensors: Tensors, dtype: torch.dtype) -> Tensors:
        """The same tensors in another dtype, as leaves."""

        def leaf(name: str, tensor: Tensor) -> Tensor:
            wanted = torch.promote_types(dtype, torch.float32) if name in self.statistics else dtype
            wanted = wanted if tensor.is_floating_point() else tensor.dtype
            leaf = tensor.detach().to(wanted, copy=True)
            return leaf.requires_grad_(name in self.differentiable)

        return {
            name: tree_map_only(Tensor, partial(leaf, name), value)
            for name, value in tensors.items()
        }


_THEMES = "grids layers layouts models rounding smoothing statistics storage"
_ROTATIONS = "klt_rotation kurtail_rotation qsur"
ONCE = (
    *(f"tilework.quant.{theme}." for theme in _THEMES.split()),
    *(f"tilework.quant.rotations.{module}" for module in _ROTATIONS.split()),
)
"""Modules of functions that run once on trained weights, and not in a forward pass."""


def public_functions() -> dict[str, Callable[..., Any]]:
    """The functions of tensors by name, but for those that act in place, or run once."""
    return {
        entry.object.__name__: entry.object
        for entry in catalog.entries()
        if inspect.isfunction(entry.object)
        and not entry.object.__name__.endswith("_")
        and not entry.object.__module__.startswith(ONCE)
        and "Tensor" in str(inspect.signature(entry.object).parameters)
    }


@cache
def all_calls() -> tuple[Call, ...]:
    """Every call with one set of options."""
    return tuple(
        replace(call, options=(options,))
        for call in samples.collect(Call)
        for options in call.options
    )


def of_implementations() -> Iterator[Call]:
    """Every call by default and by each implementation."""
    return chain.from_iterable(call.of_implementations() for call in all_calls())


def marked(calls: Iterable[Call]) -> pytest.MarkDecorator:
    """Run a test on these calls."""
    return pytest.mark.parametrize("call", list(calls), ids=lambda call: call.label)


def every_call(test: Callable[..., None]) -> Any:
    """Run a test on every call."""
    return marked(all_calls())(test)
