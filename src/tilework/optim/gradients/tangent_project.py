"""Steps on spheres: gradients without their radial part, parameters of a given norm."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements

__all__ = ["renorm_", "tangent_project_"]

_paper = implements("Logit Attenuating Weight Normalization", year=2021, arxiv="2108.05839")


@_paper
def tangent_project_(parameters: Tensor | Iterable[Tensor]) -> Float[Tensor, "count"]:
    r"""Take from each gradient, in place, its part along the parameter.

    With the parameter :math:`p` and its gradient :math:`g`, as whole tensors:

    .. math::

        g \leftarrow g - \frac{\langle g, p \rangle}{\lVert p \rVert^2}\, p

    A step along it leaves the norm of the parameter as it is, to first order. The gradient of a
    parameter of zeros is left alone. Computed in float32 (float64 for float64).

    Args:
        parameters: A tensor or an iterable of such; those without a gradient are skipped.

    Returns:
        :math:`\langle g, p \rangle / \lVert p \rVert` of each parameter with a gradient before
        the change, 0 where the parameter is; one-dimensional, on the device of the first one.

    Raises:
        TypeError: A parameter or its gradient is not a dense tensor of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.optim import tangent_project_
        >>> weight = torch.tensor([3.0, 4.0])
        >>> weight.grad = torch.tensor([5.0, 5.0])
        >>> tangent_project_(weight)
        tensor([7.])
        >>> weight.grad
        tensor([ 0.8000, -0.6000])

    Reference:
        Aman Gupta, Rohan Ramanath, Jun Shi, Anika Ramachandran, Sirou Zhou, Mingzhou Zhou, and
        S. Sathiya Keerthi. Logit Attenuating Weight Normalization. 2021. arXiv:2108.05839.
    """
    name, parts = "tangent_project_", []
    with torch.no_grad():
        for index, parameter in enumerate(_listed(name, parameters)):
            grad = parameter.grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise _checks.bad_type(name, f"parameters[{index}].grad", "a dense tensor", grad)
            unit, _ = unit_and_norm(parameter)
            values = grad.to(unit.dtype)
            part = (values * unit).sum()
            grad.copy_(values - part * unit)
            parts.append(part)
    return _stacked(parts)


@_paper
def renorm_(
    parameters: Tensor | Iterable[Tensor], norms: Sequence[float | Tensor] | Tensor
) -> Float[Tensor, "count"]:
    r"""Scale each parameter, in place, to a norm.

    With the parameter :math:`p` as a whole tensor, and its :math:`c` in ``norms``:

    .. math::

        p \leftarrow \frac{c}{\lVert p \rVert}\, p

    A parameter of zeros is left alone. Computed in float32 (float64 for float64).

    Args:
        parameters: A tensor or an iterable of such.
        norms: One for each parameter, at least 0: numbers, tensors without dimensions, or a tensor
            of one dimension.

    Returns:
        The norms before, one-dimensional, on the device of the first parameter.

    Raises:
        ValueError: There are not as many norms as parameters, or one is below 0 or has dimensions.
        TypeError: A parameter is not a tensor of a real floating dtype, or a norm is no number.

    Example:
        >>> import torch
        >>> from tilework.optim import renorm_
        >>> weight = torch.tensor([3.0, 4.0])
        >>> renorm_(weight, [1.0])
        tensor([5.])
        >>> weight
        tensor([0.6000, 0.8000])

    Reference:
        Aman Gupta, Rohan Ramanath, Jun Shi, Anika Ramachandran, Sirou Zhou, Mingzhou Zhou, and
        S. Sathiya Keerthi. Logit Attenuating Weight Normalization. 2021. arXiv:2108.05839.
    """
    name, before = "renorm_", []
    listed = _listed(name, parameters)
    if not isinstance(norms, Tensor | Sequence):
        raise _checks.bad_type(name, "norms", "a sequence or a tensor", norms)
    if (isinstance(norms, Tensor) and norms.dim() != 1) or len(norms) != len(listed):
        raise _checks.bad_value(name, "norms", f"{len(listed)}, one for each parameter", norms)
    for index, norm in enumerate(norms):
        if not isinstance(norm, Tensor) or (norm.dim() == 0 and _checks.holds_values(norm)):
            value = norm.item() if isinstance(norm, Tensor) else norm
            _checks.at_least(name, f"norms[{index}]", value, 0)
        elif norm.dim():
            raise _checks.bad_value(name, f"norms[{index}]", "without dimensions", norm)
    with torch.no_grad():
        for parameter, norm in zip(listed, norms, strict=True):
            unit, size = unit_and_norm(parameter)
            scale = norm.to(unit) if isinstance(norm, Tensor) else norm
            parameter.copy_(unit * scale)
            before.append(size)
    return _stacked(before)


def unit_and_norm(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """A parameter over its norm, zeros where it is zeros, and the norm, in the wide dtype."""
    values = parameter.detach().to(computation_dtype(parameter.dtype))
    norm = torch.linalg.vector_norm(values)
    return values / norm.where(norm != 0, 1), norm


def _listed(name: str, parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if not isinstance(parameters, Tensor | Iterable):
        raise _checks.bad_type(name, "parameters", "a tensor or an iterable of such", parameters)
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for index, parameter in enumerate(listed):
        _checks.floating(name, f"parameters[{index}]", parameter)
    return listed


def _stacked(numbers: list[Tensor]) -> Tensor:
    if not numbers:
        return torch.zeros(0)
    plain = [n.full_tensor() if _checks.is_distributed(n) else n for n in numbers]  # type: ignore[attr-defined]
    dtype = torch.float64 if any(n.dtype == torch.float64 for n in plain) else torch.float32
    return torch.stack([number.to(plain[0].device, dtype) for number in plain])
