"""Which layers of a model can be quantized, and why others are not."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from tilework import _checks
from tilework.quant.layers.quant_linear import QuantLinear

Filter = Callable[[str, nn.Module], bool]


class Place(NamedTuple):
    """Where a module is held."""

    parent: nn.Module
    name: str


class Candidate(NamedTuple):
    """A layer to be quantized, by its first name, and all places that hold it."""

    name: str
    layer: nn.Module
    places: list[Place]

    @property
    def weight(self) -> Tensor:
        """Of shape (out, in)."""
        weight = self.layer.get_parameter("weight").detach()
        return weight.mT if is_transposed(self.layer) else weight

    @property
    def bias(self) -> nn.Parameter | None:
        """Of shape (out,), if it has one."""
        return self.layer._parameters["bias"]

    def replace(self, new: nn.Module) -> None:
        """Put another layer into all places."""
        replace(self.layer, new, self.places)


def replace(old: nn.Module, new: nn.Module, places: list[Place]) -> None:
    """Put another layer into the places of one; it takes its hooks over, with their handles."""
    for key, value in vars(old).items():
        if key.startswith(("_forward", "_backward", "_is_full_backward")):
            setattr(new, key, value)
    new.training = old.training
    for parent, name in places:
        setattr(parent, name, new)


def is_transposed(module: nn.Module) -> bool:
    """Whether it is a linear layer of transformers that holds its weight as (in, out)."""
    found = sys.modules.get("transformers.pytorch_utils")
    return found is not None and type(module) is found.Conv1D


def shape_of(module: nn.Module) -> tuple[int, int] | None:
    """The shape (out, in) of a layer's weight; None of what is no linear layer."""
    if is_transposed(module):
        columns, rows = module.get_parameter("weight").shape
        return rows, columns
    if isinstance(module, nn.Linear | QuantLinear):
        return module.out_features, module.in_features
    return None


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All that are not quantized, and their names."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_transposed(module):
            yield name, module


def places_of(model: nn.Module) -> dict[int, list[Place]]:
    """Where a model holds each of its modules, by their ids."""
    places: dict[int, list[Place]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append(Place(parent, name))
    return places


def candidates(
    model: nn.Module, filter_fn: Filter | None
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The layers that can be quantized, and the others with the reason, by their names."""
    holders = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    places = places_of(model)
    found, skipped = {}, {}
    for name, layer in linear_layers(model):
        reason = _reason(name, layer, holders, filter_fn)
        if reason is None:
            found[name] = Candidate(name, layer, places[id(layer)])
        else:
            skipped[name] = reason
    return found, skipped


def _reason(
    name: str, layer: nn.Module, holders: Counter[int], filter_fn: Filter | None
) -> str | None:
    """Why a linear layer is not quantized; None if it is."""
    if type(layer) is not nn.Linear and not is_transposed(layer):
        return f"{type(layer).__name__}, a subclass of nn.Linear that may compute something else"
    if "forward" in vars(layer):
        return "a forward of its own"
    weight = layer.weight
    if not name:
        return "the model itself, which nothing holds"
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"a weight of {str(getattr(weight, 'dtype', type(weight))).removeprefix('torch.')}"
    if holders[id(weight)] > 1:
        return "a weight that another module has too"
    if _checks.is_distributed(weight):
        return "a weight that is distributed over devices"
    if weight.is_meta:
        return "a weight without values, on meta"
    if not weight.numel():
        return "a weight without entries"
    if filter_fn is not None and not filter_fn(name, layer):
        return "filter_fn"
    return None
