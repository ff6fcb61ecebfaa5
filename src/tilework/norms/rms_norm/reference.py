"""RMS normalization by its definition."""

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
    """Return the normalized sum of input and residual, and the sum itself."""
    dtype = computation_dtype(input.dtype)
    total = input.to(dtype)
    if residual is not None:
        total = total + residual.to(dtype)
    dims = tuple(range(-len(normalized_shape), 0))
    output = total * (total.square().mean(dims, keepdim=True) + eps).rsqrt()
    if weight is not None:
        output = output * (weight.to(dtype) + weight_offset)
    return output.to(input.dtype), total.to(input.dtype)
