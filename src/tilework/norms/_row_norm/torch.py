"""RMS and layer normalization by torch's kernels, fused where torch has such a kernel."""

import torch.nn.functional as F
from torch import Tensor

from tilework._operators import computation_dtype


def forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    num_measured: int,
    eps: float,
    weight_offset: float,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    """See ``reference.forward``."""
    per_head = weight is not None and weight.dim() > dims
    same_dtype = all(t is None or t.dtype == input.dtype for t in (weight, bias))
    if residual is None and not weight_offset and same_dtype and not per_head:
        # Under autocast it returns float32 on some devices.
        return _norm(input, weight, bias, dims, eps, centered).to(input.dtype), input
    # The kernel rounds its result to its input's dtype, so that it gets the unrounded sum.
    dtype = computation_dtype(input.dtype)
    total = input.to(dtype)
    if residual is not None:
        total = total + residual.to(dtype)
    gain = None if weight is None else weight.to(dtype) + weight_offset
    bias = None if bias is None else bias.to(dtype)
    output = _norm(total, None if per_head else gain, bias, dims, eps, centered)
    if per_head and gain is not None:
        output = output * gain
    return output.to(input.dtype), total.to(input.dtype)


def _norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    centered: bool,
) -> Tensor:
    shape = input.shape[-dims:]
    if centered:
        return F.layer_norm(input, shape, weight, bias, eps)
    return F.rms_norm(input, shape, weight, eps)
