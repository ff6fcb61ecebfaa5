"""PyTorch's product of bfloat16 activations and codes of 4 bits on a CPU."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import is_autocast
from tilework.quant.storage._stored import Form

GROUPS = (32, 64, 128, 256)
ROWS = 512
"""Above which weights are dequantized once for all rows in less time."""
_ZERO = 8
_TILES = 2


class Prepared(NamedTuple):
    """A layer's codes and grids as the product takes them, and what they were made of."""

    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    codes: Tensor
    grids: Tensor

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        """Whether it was made of these tensors as they are now."""
        same = all(one is other for one, other in zip(self.sources, sources, strict=True))
        return same and self.versions == _versions(sources)


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(0 if one.is_inference() else one._version for one in tensors)


def applies(input: Tensor, form: Form) -> bool:
    """Whether the product takes these activations and weights, and is faster."""
    options = form.options
    size = options.get("group_size")
    return (
        input.dtype == torch.bfloat16
        and _checks.holds_values(input)
        and not (input.requires_grad and torch.is_grad_enabled())
        and not is_autocast("cpu")
        and 0 < input.numel() <= ROWS * form.shape[1]
        and form.is_plain
        and options["bits"] == 4
        and size in GROUPS
        and form.shape[1] % size == 0
        and form.shape[0] % 16 == 0
    )


def prepared(quantized: Any, sources: tuple[Tensor, ...]) -> Prepared:
    """Codes and grids as the product takes them: weights are scale * (code - 8) + shift."""
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized.codes.int(), _TILES)
    scale = quantized.scale
    pairs = torch.stack([scale, scale * (_ZERO - quantized.zero_point)], -1)
    grids = pairs.transpose(0, 1).to(torch.bfloat16).contiguous()
    return Prepared(sources, _versions(sources), codes, grids)


def product(input: Tensor, weights: Prepared, group_size: int) -> Tensor:
    """The products of the rows of the input and of the weights."""
    rows = input.detach().reshape(-1, input.shape[-1]).contiguous()
    output: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows, weights.codes, group_size, weights.grids
    )
    return output.reshape(*input.shape[:-1], -1)
