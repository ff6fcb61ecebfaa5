"""Which schedule computes a loss and its gradients: logits computed again, or chunks kept.

With ``N`` tokens, ``D`` features, ``V`` classes and ``g`` wanted gradients, of input and weight:

- again (``"tiled"``, ``"triton"``): ``2 N V D (2 + g)`` operations, memory of a few tiles;
- chunks (``"chunked"``): ``2 N V D (1 + g)`` operations, memory of a chunk of logits.

Matrix products take nearly all of the time, so chunks are preferred wherever their memory is small:
at most 256 MiB, or half of the gradients' own. On CUDA they are for those who ask for them.
"""

from dataclasses import dataclass

from torch import Tensor

from tilework.losses._classes import early
from tilework.losses._classes.linear import chunked, tiled

SMALL = 256 * 2**20
PREFERRED = (
    "on a CPU, gradients of a sum or mean where a chunk's logits are small beside them, as "
    "tilework doctor --head tells"
)


@dataclass(frozen=True)
class Cost:
    """What a schedule costs for loss and gradients, in operations and in bytes beyond gradients."""

    is_chunked: bool
    operations: int
    extra_bytes: int


def costs(input: Tensor, linear_weight: Tensor, gradients: int = 2) -> tuple[Cost, Cost]:
    """The cost of both schedules, for ``input`` of shape (N, D)."""
    product = 2 * input.shape[0] * linear_weight.numel()
    return (
        Cost(False, product * (2 + gradients), tiled.extra_bytes(input, linear_weight)),
        Cost(True, product * (1 + gradients), chunked.extra_bytes(input, linear_weight)),
    )


def prefers_chunks(
    input: Tensor,
    *,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    is_sum: bool,
) -> bool:
    """Whether chunks can be taken for a loss, sum or mean, and are worth their memory."""
    if input.device.type != "cpu" or not is_sum:
        return False
    gradients = (input.numel() + linear_weight.numel()) * input.dtype.itemsize
    return early.is_possible(input, linear_weight, linear_bias) and (
        chunked.extra_bytes(input, linear_weight) <= max(SMALL, gradients // 2)
    )
