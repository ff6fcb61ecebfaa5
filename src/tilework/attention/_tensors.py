"""What every attention checks of query, key and value."""

from typing import Any

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import is_autocast


def check_tensors(
    function: str, query: Tensor, key: Tensor, value: Tensor | None, enable_gqa: bool
) -> None:
    """Refuse what is no query of shape (B, Hq, Lq, E), key (B, Hkv, Lk, E), value (…, Ev)."""
    tensors = {"query": query, "key": key}
    if value is not None:
        tensors["value"] = value
    for name, tensor in tensors.items():
        _checks.floating(function, name, tensor)
        if tensor.dim() != 4:
            raise _checks.bad_value(function, name, "of shape (B, H, L, E)", tensor)
        if tensor.dtype != query.dtype and not is_autocast(query.device.type):
            raise _checks.bad_type(function, name, f"of query's {query.dtype}", tensor)
    batch, heads, _, features = query.shape
    kv_heads, keys = key.shape[1:3]
    if enable_gqa:
        if kv_heads == 0 or heads % kv_heads:
            expected = f"of a number of heads that divides query's {heads}"
            raise _checks.bad_value(function, "key", expected, key)
    elif kv_heads != heads:
        expected = f"of query's {heads} heads, or with enable_gqa=True of a divisor of them"
        raise _checks.bad_value(function, "key", expected, key)
    _checks.shape(function, "key", key, (batch, kv_heads, keys, features))
    if value is not None:
        _checks.shape(function, "value", value, (batch, kv_heads, keys, value.shape[-1]))
    _checks.same_device(function, **tensors)


def check_scale(function: str, scale: float | None) -> float | None:
    """The factor of the scores, None for that of the features; refuse what is no number."""
    return None if scale is None else float(_checks.number(function, "scale", scale))


def scale_of(given: Any) -> float:
    """The factor of the scores, for the arguments of an operator.

    These have None for the usual one: a number made of a symbolic size would fix it.
    """
    scale: float = given.scale
    if scale is None:
        scale = 1 / torch.sym_sqrt(torch.sym_max(1, given.query.shape[-1]))
    return scale


def cast_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts the arguments of attention."""
    device = tensors[0].device.type
    if not is_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
