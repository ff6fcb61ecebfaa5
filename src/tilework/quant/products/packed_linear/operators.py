"""The operators of the product and of the gradient of its input, each the other's derivative."""

from tilework import _operators
from tilework._operators import Gradients, Needed, computation_dtype
from tilework.quant.products.packed_linear import reference
from tilework.quant.products.packed_linear.common import (
    Backward,
    Gradient,
    Output,
    Product,
    empty_gradient,
    empty_output,
    operations,
)

_WEIGHTS = ("packed", "scale", "zero_point")


def _derivative(given: Product, _: Output, grads: Output, needed: Needed) -> Gradients:
    grad, found = grads.output, {}
    if "input" in needed:
        of_input = Backward(
            grad,
            given.packed,
            given.scale,
            given.zero_point,
            given.columns,
            given.bits,
            given.group_size,
            given.implementation,
        )
        found["input"] = _of_input(of_input).input
    if "bias" in needed:
        found["bias"] = grad.sum(0, dtype=computation_dtype(grad.dtype)).to(grad.dtype)
    return found


def _second_derivative(given: Backward, _: Gradient, grads: Gradient, needed: Needed) -> Gradients:
    back = Product(
        grads.input,
        given.packed,
        given.scale,
        given.zero_point,
        None,
        given.columns,
        given.bits,
        given.group_size,
        given.implementation,
    )
    return {"grad_output": packed_linear(back).output} if "grad_output" in needed else {}


_of_input = _operators.or_reference(
    _operators.define(
        "packed_linear_backward",
        Backward,
        Gradient,
        _operators.of_rooms(__package__, "backward"),
        empty_gradient,
        derivative=_second_derivative,
        saved=_WEIGHTS,
        operations=lambda given: operations(given.grad_output, given.columns),
    ),
    reference.backward,
)
packed_linear = _operators.or_reference(
    _operators.define(
        "packed_linear",
        Product,
        Output,
        _operators.of_rooms(__package__, "forward"),
        empty_output,
        derivative=_derivative,
        saved=_WEIGHTS,
        operations=lambda given: operations(given.input, given.packed.shape[0]),
    ),
    reference.forward,
)
