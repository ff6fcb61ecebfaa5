"""What RMS and layer normalization share: checks, and choice of implementation."""

import math

# The folder's torch.py takes the name of the package here.
from torch import Tensor, finfo

from tilework import _checks, _implementations, _operators
from tilework._implementations import Implementation
from tilework._operators import computation_dtype
from tilework.norms._row_norm import operators, reference, tiled, torch
from tilework.norms._row_norm.common import RowNorm

IMPLEMENTATIONS = (
    Implementation.triton(
        "two numbers per row; for gradients of weight and bias a row per program"
    ),
    Implementation(
        "tiled",
        "two numbers per row, and a few tiles of 512 KiB for each thread",
        prefers=tiled.preferred,
        when=tiled.PREFERRED,
    ),
    Implementation(
        "torch",
        "two numbers per row where torch has a fused kernel, otherwise as the reference",
        backward="every order; forward mode by the reference",
    ),
    Implementation.reference("two tensors of input's shape in the computation dtype"),
)


def row_norm(
    function: str,
    table: _implementations.Table,
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    *,
    residual: Tensor | None = None,
    num_measured: int | None = None,
    weight_offset: float,
    centered: bool,
    heads: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Check the tensors of a public function, choose an implementation and run it.

    ``heads`` allows a weight with a row for each entry of the dimension before the normalized ones.
    """
    _check_tensors(function, input, normalized_shape, weight, bias, residual, heads)
    chosen = _implementations.choose(
        function,
        table,
        implementation,
        input,
        residual=residual,
        weight=weight,
        bias=bias,
        centered=centered,
    )
    if eps is None:
        eps = finfo(computation_dtype(input.dtype)).eps
    if num_measured is None:
        num_measured = math.prod(normalized_shape)
    given = RowNorm(
        input,
        residual,
        weight,
        bias,
        len(normalized_shape),
        num_measured,
        eps,
        weight_offset,
        centered,
        input.dtype,
        None if residual is None else residual.dtype,
        chosen,
    )
    if chosen == "reference" or _operators.only_reference():
        output, total = reference.forward(given)
    elif chosen == "torch":
        output, total = torch.forward(given)
    else:
        output, total, *_ = operators.row_norm(given)
    return output if residual is None else (output, total)


def _check_tensors(
    function: str,
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    heads: bool,
) -> None:
    _checks.floating(function, "input", input)
    dims = len(normalized_shape)
    if tuple(input.shape[-dims:]) != normalized_shape:
        accepted = f"the trailing dimensions of input's {tuple(input.shape)}"
        raise _checks.bad_value(function, "normalized_shape", accepted, normalized_shape)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _checks.floating(function, name, parameter)
            per_head = heads and parameter.dim() > dims and input.dim() > dims
            expected = input.shape[-dims - 1 :] if per_head else normalized_shape
            _checks.shape(function, name, parameter, expected)
    if residual is not None:
        _checks.floating(function, "residual", residual)
        _checks.shape(function, "residual", residual, input.shape)
    _checks.same_device(function, input=input, weight=weight, bias=bias, residual=residual)
