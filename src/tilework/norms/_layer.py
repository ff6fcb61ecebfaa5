"""What the layers of norms share."""

from collections.abc import Sequence
from dataclasses import InitVar, field
from typing import ClassVar

import torch
from torch import nn

from tilework import _checks
from tilework._options import OptionsModule


class NormLayer(OptionsModule, kw_only=False):
    """The shape, eps and parameters of a norm, with the positional arguments of torch's layers.

    Options of a layer's own are keyword-only. One with a bias declares it as an argument, which
    then stands where torch's does, and hands it on to ``__post_init__``.
    """

    function: ClassVar[str]

    normalized_shape: int | Sequence[int]
    eps: float | None = None
    elementwise_affine: bool = True
    weight: nn.Parameter | None = field(init=False)
    bias: nn.Parameter | None = field(init=False)
    device: InitVar[torch.device | str | None] = None
    dtype: InitVar[torch.dtype | None] = None

    def __post_init__(
        self,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        bias: bool | None = None,
    ) -> None:
        shape = _checks.sizes(self.function, "normalized_shape", self.normalized_shape)
        self.normalized_shape = shape
        super().__post_init__()
        for name, wanted in (("weight", True), ("bias", bias)):
            if wanted is not None:
                parameter = None
                if wanted and self.elementwise_affine:
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to 1, and the shift to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        bias = self._parameters.get("bias")
        if bias is not None:
            nn.init.zeros_(bias)

    def extra_repr(self) -> str:
        """Return what torch's layers show, and the layer's own options that are not defaults."""
        shown = [str(self.normalized_shape), f"eps={self.eps}"]
        shown.append(f"elementwise_affine={self.elementwise_affine}")
        if "bias" in self._parameters:
            shown.append(f"bias={self.bias is not None}")
        return ", ".join(shown + self._changed(f for f in self._shown if f.kw_only))
