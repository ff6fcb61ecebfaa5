"""RMS normalization by torch's kernel, which is fused on the GPU."""

import torch.nn.functional as F
from torch import Tensor

from tilework._operators import computation_dtype


def rms_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """See ``reference.rms_norm``."""
    same_dtype = weight is None or weight.dtype == input.dtype
    if residual is None and not weight_offset and same_dtype:
        # Under autocast it returns float32 on some devices.
        return F.rms_norm(input, normalized_shape, weight, eps).to(input.dtype), input
    # The kernel rounds its result to its input's dtype, so that it gets the unrounded sum.
    dtype = computation_dtype(input.dtype)
    total = input.to(dtype)
    if residual is not None:
        total = total + residual.to(dtype)
    if weight is not None:
        weight = weight.to(dtype)
        if weight_offset:
            weight = weight + weight_offset
    output = F.rms_norm(total, normalized_shape, weight, eps)
    return output.to(input.dtype), total.to(input.dtype)
