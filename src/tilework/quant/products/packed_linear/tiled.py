"""The product in plain PyTorch, with the weights of some outputs at a time."""

from tilework._operators import computation_dtype
from tilework.quant.products.packed_linear.common import (
    Backward,
    Gradient,
    Output,
    Product,
    empty_output,
    tiles,
)


def forward(given: Product) -> Output:
    """See ``reference``."""
    dtype = computation_dtype(given.input.dtype)
    input = given.input.to(dtype)
    output = empty_output(given).output
    for outputs, weight in tiles(given, dtype):
        some = input @ weight.mT
        if given.bias is not None:
            some += given.bias[outputs]
        output[:, outputs] = some
    return Output(output)


def backward(given: Backward) -> Gradient:
    """See ``reference``."""
    grad = given.grad_output
    dtype = computation_dtype(grad.dtype)
    total = grad.new_zeros(grad.shape[0], given.columns, dtype=dtype)
    for outputs, weight in tiles(given, dtype):
        total.addmm_(grad[:, outputs].to(dtype), weight)
    return Gradient(total.to(grad.dtype))
