"""Clipping of gradients to a part of the norms of their weights, unit by unit."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements

__all__ = ["adaptive_grad_clip_"]

_NAME = "adaptive_grad_clip_"


@implements(
    "High-Performance Large-Scale Image Recognition Without Normalization",
    year=2021,
    arxiv="2102.06171",
)
def adaptive_grad_clip_(
    parameters: Tensor | Iterable[Tensor],
    clip_factor: float = 0.01,
    *,
    eps: float = 1e-3,
    norm_type: float = 2.0,
) -> Tensor:
    r"""Scale down, in place, each unit's gradient that is large beside the unit's weights.

    The units :math:`u` of a parameter of at least 2 dimensions are its slices along the first one,
    such as the rows of a linear layer; any other parameter is one unit. With their weights
    :math:`W_u`, their gradients :math:`G_u`, :math:`\lambda` = ``clip_factor`` and
    :math:`\epsilon` = ``eps``:

    .. math::

        M_u = \lambda \max(\lVert W_u \rVert, \epsilon), \qquad
        G_u \leftarrow G_u \, \frac{M_u}{\lVert G_u \rVert}
        \quad \text{where } \lVert G_u \rVert > M_u

    Other units keep their bits. Norms are of order ``norm_type``, taken in float32 (float64 for
    float64). Call it between ``backward`` and the optimizer's step, without the parameters of the
    final classifier. Parameters may be DTensors, as in a model under FSDP2, where all processes
    must call it.

    Args:
        parameters: A tensor or an iterable of such; those without a gradient are skipped.
        clip_factor: The largest norm of a gradient relative to that of its weights, above 0.
        eps: The least norm that weights count with, above 0.
        norm_type: Order of the norms, above 0, ``math.inf`` for the largest magnitude.

    Returns:
        How many units were clipped, a scalar of int64 on the device of the first gradient.

    Raises:
        ValueError: An option is not one of those above.
        TypeError: A parameter or its gradient is not a dense tensor of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.optim import adaptive_grad_clip_
        >>> weight = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
        >>> weight.grad = torch.tensor([[0.3, 0.4], [0.3, 0.4]])
        >>> adaptive_grad_clip_(weight, 0.1)
        tensor(1)
        >>> weight.grad
        tensor([[0.3000, 0.4000],
                [0.0600, 0.0800]])

    Deviations:
        The released code divides by the larger of the gradient's norm and 1e-6; as :math:`M_u` is
        above 0, nothing needs that, and the bound holds for every ``clip_factor``.

    Reference:
        Andrew Brock, Soham De, Samuel L. Smith, Karen Simonyan. High-Performance Large-Scale Image
        Recognition Without Normalization. 2021. arXiv:2102.06171.
    """
    _checks.positive(_NAME, "clip_factor", clip_factor)
    _checks.positive(_NAME, "eps", eps)
    norm_type = _checks.number(_NAME, "norm_type", norm_type)
    if not norm_type > 0:
        raise _checks.bad_value(_NAME, "norm_type", "a number above 0", norm_type)
    if not isinstance(parameters, Tensor | Iterable):
        raise _checks.bad_type(_NAME, "parameters", "a tensor or an iterable of such", parameters)
    pairs = _with_gradients([parameters] if isinstance(parameters, Tensor) else list(parameters))
    if not pairs:
        return torch.zeros((), dtype=torch.int64)

    device = pairs[0][1].device
    counts: dict[Any, Tensor] = {}  # one to be summed over processes or devices for each place
    with torch.no_grad():
        for parameter, grad in pairs:
            most = clip_factor * _norms(parameter, norm_type).clamp(min=eps)
            norms = _norms(grad, norm_type)
            is_larger = norms > most
            grad.mul_((most / norms).where(is_larger, 1))  # the factor 1 changes no bit
            count = is_larger.sum()
            place = _place(count)
            counts[place] = counts[place] + count if place in counts else count
        whole = [_whole(count).to(device) for count in counts.values()]
        return torch.stack(whole).sum()


def _with_gradients(parameters: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for index, parameter in enumerate(parameters):
        _checks.floating(_NAME, f"parameters[{index}]", parameter)
        grad = parameter.grad
        if grad is None:
            continue
        if grad.layout != torch.strided:
            accepted = "a dense tensor"
            raise _checks.bad_type(_NAME, f"parameters[{index}].grad", accepted, grad)
        if grad.numel():
            pairs.append((parameter, grad))
    return pairs


def _whole(tensor: Any) -> Tensor:
    result: Tensor = tensor.full_tensor() if _checks.is_distributed(tensor) else tensor
    return result


def _place(tensor: Any) -> Any:
    is_distributed = _checks.is_distributed(tensor)
    return (tensor.device_mesh, tensor.placements) if is_distributed else tensor.device


def _norms(tensor: Tensor, order: float) -> Tensor:
    """The norm of each unit, in a shape that broadcasts against the tensor."""
    has_units = tensor.dim() > 1
    if not has_units and order == math.inf:  # a process without elements of it has no largest
        tensor = _whole(tensor)
    norms: Tensor = torch.linalg.vector_norm(
        tensor,
        order,
        tuple(range(1, tensor.dim())) if has_units else None,
        keepdim=has_units,
        dtype=computation_dtype(tensor.dtype),
    )
    return norms
