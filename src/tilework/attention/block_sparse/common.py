"""What implementations and fake kernels return: packed results are contiguous by rows."""

from torch import Tensor

from tilework._operators import computation_dtype


def empty_results(query: Tensor, value: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exps."""
    output = query.new_empty(_shape(query, packed, value.shape[-1]))
    lse = query.new_empty(_shape(query, packed), dtype=computation_dtype(query.dtype))
    return (output.transpose(1, 2), lse.transpose(1, 2)) if packed else (output, lse)


def empty_gradient(tensor: Tensor, packed: bool) -> Tensor:
    """The gradient of query, key or value."""
    gradient = tensor.new_empty(_shape(tensor, packed, tensor.shape[-1]))
    return gradient.transpose(1, 2) if packed else gradient


def _shape(tensor: Tensor, packed: bool, *features: int) -> tuple[int, ...]:
    batch, heads, rows, _ = tensor.shape
    return (batch, rows, heads, *features) if packed else (batch, heads, rows, *features)
