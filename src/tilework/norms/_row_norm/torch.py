"""RMS and layer normalization by torch's kernels, fused where torch has such a kernel."""

import torch.nn.functional as F
from torch import Tensor

from tilework._operators import computation_dtype
from tilework.norms._row_norm.common import RowNorm


def forward(given: RowNorm) -> tuple[Tensor, Tensor]:
    """See ``reference.forward``."""
    input, residual, weight, bias = given.input, given.residual, given.weight, given.bias
    per_head = weight is not None and weight.dim() > given.dims
    same_dtype = all(t is None or t.dtype == input.dtype for t in (weight, bias))
    if residual is None and not given.weight_offset and same_dtype and not per_head:
        # Under autocast it returns float32 on some devices.
        return _norm(given, input, weight, bias).to(input.dtype), input
    # The kernel rounds its result to its input's dtype, so that it gets the unrounded sum.
    dtype = computation_dtype(input.dtype)
    total = input.to(dtype)
    if residual is not None:
        total = total + residual.to(dtype)
    gain = None if weight is None else weight.to(dtype) + given.weight_offset
    bias = None if bias is None else bias.to(dtype)
    output = _norm(given, total, None if per_head else gain, bias)
    if per_head and gain is not None:
        output = output * gain
    return output.to(input.dtype), total.to(given.total_dtype)


def _norm(given: RowNorm, rows: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = rows.shape[-given.dims :]
    if given.centered:
        return F.layer_norm(rows, shape, gain, bias, given.eps)
    return F.rms_norm(rows, shape, gain, given.eps)
