"""RMS and layer normalization by their definition."""

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
    """Normalize the sum of input and residual over its last ``dims`` dimensions; return both.

    ``centered`` subtracts the mean first. A weight with one dimension more than ``dims`` has a row
    for each entry of the dimension before. The scale is that of the first ``num_measured``
    elements, which are all of them if ``dims`` is above 1.
    """
    dtype = computation_dtype(input.dtype)
    total = input.to(dtype)
    if residual is not None:
        total = total + residual.to(dtype)
    trailing = tuple(range(-dims, 0))
    output = total - total.mean(trailing, keepdim=True) if centered else total
    measured = output if dims > 1 else output[..., :num_measured]
    output = output * (measured.square().mean(trailing, keepdim=True) + eps).rsqrt()
    if weight is not None:
        output = output * (weight.to(dtype) + weight_offset)
    if bias is not None:
        output = output + bias.to(dtype)
    return output.to(input.dtype), total.to(input.dtype)
