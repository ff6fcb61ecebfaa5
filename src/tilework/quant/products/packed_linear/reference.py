"""The product by its definition: all weights at once."""

from tilework._operators import computation_dtype
from tilework.quant.products.packed_linear.common import (
    Backward,
    Gradient,
    Output,
    Product,
    weights,
)


def forward(given: Product) -> Output:
    """Return the products of rows, with the bias added."""
    dtype = computation_dtype(given.input.dtype)
    output = given.input.to(dtype) @ weights(given, dtype).mT
    if given.bias is not None:
        output = output + given.bias.to(dtype)
    return Output(output.to(given.input.dtype))


def backward(given: Backward) -> Gradient:
    """Return the gradient of the input."""
    dtype = computation_dtype(given.grad_output.dtype)
    gradient = given.grad_output.to(dtype) @ weights(given, dtype)
    return Gradient(gradient.to(given.grad_output.dtype))
