"""What every function of a linear head checks, casts and chooses from."""

from typing import Any

import torch
from torch import Tensor

from tilework import _checks, _operators


def check(
    function: str,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    prefix: str = "",
) -> None:
    """Refuse tensors that are no head; ``prefix`` comes before the names of the arguments."""
    names = [f"{prefix}{name}" for name in ("input", "linear_weight", "linear_bias")]
    if prefix:
        names = [name.replace("linear_", "") for name in names]
    input_name, weight_name, bias_name = names
    _checks.floating(function, input_name, input)
    _checks.floating(function, weight_name, linear_weight)
    accepted = f"of {input_name}'s {input.dtype}"
    if linear_weight.dtype != input.dtype:
        raise _checks.bad_type(function, weight_name, accepted, linear_weight)
    if input.dim() == 0 or input.shape[-1] == 0:
        shape = "of shape (..., D), D >= 1"
        raise _checks.bad_value(function, input_name, shape, input)
    features = input.shape[-1]
    if linear_weight.dim() != 2 or linear_weight.shape[1] != features or not linear_weight.shape[0]:
        shape = f"of shape (V, {features}), as {input_name} has {features} features, V >= 1"
        raise _checks.bad_value(function, weight_name, shape, linear_weight)
    if linear_bias is not None:
        _checks.floating(function, bias_name, linear_bias)
        if linear_bias.dtype != input.dtype:
            raise _checks.bad_type(function, bias_name, accepted, linear_bias)
        _checks.shape(function, bias_name, linear_bias, linear_weight.shape[:1])


def check_filter(function: str, gradient_filter: float | None) -> None:
    """Refuse what is neither None nor a number between 0 and 1."""
    if gradient_filter is not None:
        _checks.open_fraction(function, "gradient_filter", gradient_filter)


def cast_under_autocast(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast casts the arguments of ``F.linear``: float64 and other types stay."""
    device = input.device.type if isinstance(input, Tensor) else "cpu"
    if not _operators.is_autocast(device):
        return input, linear_weight, linear_bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Any) -> Any:
        eligible = isinstance(tensor, Tensor) and tensor.dtype in (*_operators.HALF, torch.float32)
        return tensor.to(dtype) if eligible else tensor

    return cast(input), cast(linear_weight), cast(linear_bias)
