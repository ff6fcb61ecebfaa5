"""What the configurations of all algorithms have."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tilework.quant._arguments import computed
from tilework.quant.grids.rtn_quantize import rtn_quantize
from tilework.quant.models._calibration import Rows, Statistics
from tilework.quant.models._candidates import Candidate
from tilework.quant.statistics.hessian_accumulator import HessianAccumulator
from tilework.quant.storage._stored import StoredWeights
from tilework.quant.storage.quantized_tensor import QuantizedTensor


@dataclass(frozen=True)
class Config:
    """An algorithm and its options, which are the fields."""

    function: ClassVar[Callable[..., StoredWeights]]
    statistics: ClassVar[Literal["none", "hessian", "rows"]] = "hessian"

    @property
    def algorithm(self) -> str:
        """The name of the algorithm."""
        return type(self).__name__.removesuffix("Config")

    def options(self) -> dict[str, Any]:
        """Those of the function."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def quantize(self, weight: Tensor, statistics: Tensor | None) -> StoredWeights:
        """Quantize weights with the Hessian or the rows of their inputs, or with neither."""
        given = () if statistics is None else (statistics,)
        return type(self).function(weight, *given, **self.options())

    def check(self) -> None:
        """Refuse options that the function refuses."""
        options = self.options()
        if "generator" in options:
            options["generator"] = None
        weight = torch.eye(4)
        given = () if self.statistics == "none" else (weight,)
        type(self).function(weight, *given, **options)

    def nearest(self, weight: Tensor) -> QuantizedTensor | None:
        """The weights rounded to nearest with as many bits; None where there is no such thing."""
        options = self.options()
        if "bits" not in options:
            return None
        known = {
            name: options[name] for name in ("bits", "group_size", "scheme") if name in options
        }
        return rtn_quantize(weight, **known)

    def empty_statistics(self, layer: Candidate) -> Statistics:
        """What a layer's inputs are gathered in."""
        if self.statistics == "rows":
            return Rows(self.max_tokens)  # type: ignore[attr-defined]
        weight = layer.weight
        dtype = computed(weight)
        return HessianAccumulator(weight.shape[1], device=weight.device, dtype=dtype)

    def hessian(self, statistics: Tensor) -> Tensor:
        """The Hessian of inputs, which may be given by their rows."""
        if self.statistics == "hessian":
            return statistics
        rows = statistics.to(computed(statistics))
        return rows.mT @ rows * (2 / len(rows))
