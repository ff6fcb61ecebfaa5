"""The operators of RMS and layer normalization and how they differentiate."""

from typing import Any

import torch
from torch import Tensor

from tilework import _operators
from tilework._operators import Needed, computation_dtype
from tilework.norms._row_norm import reference
from tilework.norms._row_norm.common import Backward, Gradients, Normalized, RowNorm


def row_norm(given: RowNorm) -> Normalized:
    """Run an implementation that has gradients of its own."""
    return (_of_input if given.residual is None else _of_sum)(given)


def _forward_fake(given: RowNorm) -> Normalized:
    input = given.input
    leading, dtype = input.shape[: -given.dims], computation_dtype(input.dtype)
    return Normalized(
        input.new_empty(input.shape),
        input.new_empty(0 if given.residual is None else input.shape, dtype=given.total_dtype),
        input.new_empty(leading if given.centered else 0, dtype=dtype),
        input.new_empty(leading, dtype=dtype),
    )


def _derivative(
    given: RowNorm, results: Normalized, grads: Any, needed: Needed
) -> dict[str, Tensor | None]:
    residual_dtype = given.residual_dtype
    total, grad_total = given.input, None
    if residual_dtype is not None:
        total, grad_total = results.total, grads.total
    dtype = total.dtype
    found: dict[str, Tensor | None] = {}
    if grads.output is not None:
        gradients = _row_norm_backward(
            Backward(
                grads.output,
                grad_total,
                total,
                given.weight,
                given.bias,
                results.mean,
                results.rstd,
                given.dims,
                given.num_measured,
                given.eps,
                given.weight_offset,
                given.centered,
                dtype if residual_dtype is None else torch.promote_types(dtype, residual_dtype),
                ["input" in needed or "residual" in needed, "weight" in needed, "bias" in needed],
                given.implementation,
            )
        )
        grad_total = gradients.total
        found = {"weight": gradients.weight, "bias": gradients.bias}
    if grad_total is not None:
        found["input"] = grad_total.to(given.input_dtype)
        if residual_dtype is not None:
            found["residual"] = grad_total.to(residual_dtype)
    return {name: found.get(name) for name in needed}


def _backward_fake(given: Backward) -> Gradients:
    total = given.total
    need_total, *need_parameters = given.needed
    return Gradients(
        total.new_empty(total.shape if need_total else 0, dtype=given.dtype),
        *(
            total.new_empty(0)
            if parameter is None or not need
            else parameter.new_empty(parameter.shape)
            for parameter, need in zip((given.weight, given.bias), need_parameters, strict=True)
        ),
    )


_Tensors = dict[str, Tensor]


def _second_derivative(given: Backward, _: Any, grads: Any, needed: Needed) -> _Tensors:
    """The second derivative is that of the reference's first."""
    values = {name: getattr(given, name) for name in _DIFFERENTIABLE}
    leaves = {name: value for name, value in values.items() if value is not None}
    wanted = [name for name, need in zip(Gradients._fields, given.needed, strict=True) if need]

    def output(of: _Tensors) -> Tensor:
        rows = RowNorm(
            of["total"],
            None,
            of.get("weight"),
            of.get("bias"),
            given.dims,
            given.num_measured,
            given.eps,
            given.weight_offset,
            given.centered,
            of["total"].dtype,
            None,
            "reference",
        )
        return reference.forward(rows)[0]

    def first_derivative(of: _Tensors) -> _Tensors:
        arguments = {name: of[name] for name in Gradients._fields if name in of}
        (found,) = torch.func.vjp(output, arguments)[1](of["grad_output"].to(of["total"].dtype))
        if "grad_total" in of:
            found["total"] = found["total"] + of["grad_total"]
        return {name: found[name] for name in wanted}

    first, pull, *_ = torch.func.vjp(first_derivative, leaves)
    upstream = {name: getattr(grads, name) for name in wanted}
    (second,) = pull(
        {
            name: torch.zeros_like(first[name]) if grad is None else grad
            for name, grad in upstream.items()
        }
    )
    found: _Tensors = second
    return found


def _spread(*args: Any) -> Any:
    """The rule for distributed tensors, which is imported on its first use."""
    from tilework.norms._row_norm import sharding

    return sharding.forward(RowNorm(*args))


def _spread_backward(*args: Any) -> Any:
    from tilework.norms._row_norm import sharding

    return sharding.backward(Backward(*args))


_ROOMS = "tilework.norms._row_norm"
_DIFFERENTIABLE = ("grad_output", "grad_total", "total", "weight", "bias")
# One of them saves the input, the other the sum.
_of_input, _of_sum = (
    _operators.define(
        name,
        RowNorm,
        Normalized,
        _operators.of_rooms(_ROOMS, "forward"),
        _forward_fake,
        derivative=_derivative,
        saved=(*saved, *attached, "weight", "bias", "mean", "rstd"),
        constant=("mean", "rstd"),
        attached=attached,
        sharding=_spread,
    )
    for name, saved, attached in (
        ("row_norm", ("input",), ()),
        ("row_norm_of_sum", (), ("total",)),
    )
)
_row_norm_backward = _operators.define(
    "row_norm_backward",
    Backward,
    Gradients,
    _operators.of_rooms(_ROOMS, "backward"),
    _backward_fake,
    derivative=_second_derivative,
    saved=_DIFFERENTIABLE,
    sharding=_spread_backward,
)
