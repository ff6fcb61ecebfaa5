"""RMS and layer normalization by their definition."""

from torch import Tensor

from tilework._operators import computation_dtype
from tilework.norms._row_norm.common import RowNorm


def forward(given: RowNorm) -> tuple[Tensor, Tensor]:
    """Return the output, and the sum of input and residual."""
    dtype = computation_dtype(given.input.dtype)
    total = given.input.to(dtype)
    if given.residual is not None:
        total = total + given.residual.to(dtype)
    trailing = tuple(range(-given.dims, 0))
    output = total - total.mean(trailing, keepdim=True) if given.centered else total
    measured = output if given.dims > 1 else output[..., : given.num_measured]
    output = output * (measured.square().mean(trailing, keepdim=True) + given.eps).rsqrt()
    if given.weight is not None:
        output = output * (given.weight.to(dtype) + given.weight_offset)
    if given.bias is not None:
        output = output + given.bias.to(dtype)
    return output.to(given.input_dtype), total.to(given.total_dtype)
