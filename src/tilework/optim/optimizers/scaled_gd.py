"""ScaledGD: gradient descent on low-rank factors, each preconditioned by the other one."""

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements
from tilework.optim._optimizer import (
    Numbers,
    Optimizer,
    non_negative,
    of_whole,
    one_of,
    option,
    rate,
)

__all__ = ["ScaledGD", "precondition_low_rank"]

_paper = implements(
    "The Power of Preconditioning in Overparameterized Low-Rank Matrix Sensing",
    year=2023,
    arxiv="2302.01186",
)


@_paper
def precondition_low_rank(
    grad: Float[Tensor, "*batch p r"], other: Float[Tensor, "*batch q r"], *, damping: float = 1e-3
) -> Float[Tensor, "*batch p r"]:
    r"""The gradient of a factor, preconditioned by the other factor of a product.

    For a matrix :math:`L R^\top` with the gradient :math:`G` = ``grad`` of :math:`L`, :math:`R` =
    ``other`` and :math:`\delta` = ``damping``:

    .. math::

        G\, (R^\top R + \delta I)^{-1}

    It is solved by Cholesky's factors, without damping by an LU decomposition.

    Args:
        grad: Gradient of one factor, of shape ``(..., p, r)``.
        other: The other factor, of shape ``(..., q, r)``, on the same device.
        damping: Added to the diagonal, at least 0.

    Returns:
        The direction, of the shape and dtype of ``grad``; nan where the system cannot be solved.

    Raises:
        ValueError: The shapes do not fit, or ``damping`` is below 0.
        TypeError: ``grad`` or ``other`` is no real floating-point tensor.

    Example:
        >>> import torch
        >>> from tilework.optim import precondition_low_rank
        >>> grad, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> precondition_low_rank(grad, other, damping=0.0)
        tensor([[0.2500, 2.0000]])

    Reference:
        Xingyu Xu, Yandi Shen, Yuejie Chi, and Cong Ma. The Power of Preconditioning in
        Overparameterized Low-Rank Matrix Sensing. 2023. arXiv:2302.01186.
    """
    name = "precondition_low_rank"
    _checks.floating(name, "grad", grad)
    _checks.floating(name, "other", other)
    _checks.at_least(name, "damping", damping, 0)
    if grad.dim() < 2:
        raise _checks.bad_value(name, "grad", "a matrix or a batch of them", grad)
    if other.dim() < 2 or other.shape[:-2] != grad.shape[:-2] or other.shape[-1] != grad.shape[-1]:
        batch = "".join(f"{size}, " for size in grad.shape[:-2])
        raise _checks.bad_value(name, "other", f"of shape ({batch}q, {grad.shape[-1]})", other)
    _checks.same_device(name, grad=grad, other=other)
    dtype = computation_dtype(torch.promote_types(grad.dtype, other.dtype))
    result = _solve(_gram(other.to(dtype)), grad.to(dtype).mT, float(damping), damping > 0)
    return result.mT.to(grad.dtype)


def _gram(factor: Tensor) -> Tensor:
    return factor.mT @ factor


def _solve(gram: Tensor, right: Tensor, damping: float | Tensor, definite: bool) -> Tensor:
    """``(gram + damping * I)⁻¹ right``, without waiting for the device."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    system = gram + damping * identity
    if not definite:
        return torch.linalg.solve_ex(system, right).result
    factor, info = torch.linalg.cholesky_ex(system)
    solution = torch.cholesky_solve(right, factor)
    return solution.where((info == 0)[..., None, None], torch.nan)


@_paper
class ScaledGD(Optimizer):
    r"""Gradient descent on pairs of factors, whose speed does not depend on their conditioning.

    With the factors :math:`L` of shape ``(m, r)`` and :math:`R` of shape ``(n, r)`` of a matrix
    :math:`L R^\top`, their gradients :math:`G_L` and :math:`G_R`, :math:`\eta` = ``lr`` and
    :math:`\delta` = ``damping``, both at once:

    .. math::

        L \leftarrow L - \eta\, G_L (R^\top R + \delta I)^{-1}, \qquad
        R \leftarrow R - \eta\, G_R (L^\top L + \delta I)^{-1}

    A single parameter :math:`X` is the factor of :math:`X X^\top`, and preconditions itself. With
    ``layout='lora'`` a pair is :math:`A` of shape ``(r, n)`` and :math:`B` of shape ``(m, r)``,
    factors of :math:`B A`:

    .. math::

        A \leftarrow A - \eta\, (B^\top B + \delta I)^{-1} G_A, \qquad
        B \leftarrow B - \eta\, G_B (A A^\top + \delta I)^{-1}

    A factor without a gradient is left alone, and preconditions the other one. The step does not
    wait for the device; where a system cannot be solved, the new factor is nan.

    Args:
        factors: Pairs of parameters, single parameters, or groups whose ``'params'`` is one of
            these; a parameter may be a pair of its name and itself. Each becomes a group.
        lr: Learning rate, at least 0, or a tensor of one element.
        damping: Added to the diagonals, at least 0; above 0 where a factor may be 0.
        layout: ``'factors'`` or ``'lora'``.
        <shared>

    Raises:
        ValueError: An option is not one of those above, or a group has an unknown one; or factors
            are no matrices, their ranks differ, or they are neither a pair nor single.
        TypeError: An option or a parameter is of a wrong type, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from tilework.optim import ScaledGD
        >>> left = torch.nn.Parameter(torch.tensor([[1.0], [0.0]]))
        >>> right = torch.nn.Parameter(torch.tensor([[2.0]]))
        >>> optimizer = ScaledGD([(left, right)], lr=0.5, damping=0.0)
        >>> (left @ right.T).sum().backward()
        >>> optimizer.step()
        >>> left.data, right.data
        (tensor([[ 0.7500],
                [-0.2500]]), tensor([[1.5000]]))

    Reference:
        Xingyu Xu, Yandi Shen, Yuejie Chi, and Cong Ma. The Power of Preconditioning in
        Overparameterized Low-Rank Matrix Sensing. 2023. arXiv:2302.01186.
    """

    params: ClassVar[None] = None  # type: ignore[assignment,misc]  # factors stand in its place
    factors: Iterable[Any]
    lr: float | Tensor = option(1e-2, rate)
    _: KW_ONLY
    damping: float = option(1e-3, non_negative)
    layout: str = option("factors", one_of("factors", "lora"))

    _elementwise = False

    def _groups(self, given: Any) -> list[dict[str, Any]]:
        if isinstance(given, Tensor) or not isinstance(given, Iterable):
            accepted = "an iterable of pairs of parameters, single ones, or groups of these"
            raise _checks.bad_type(self._name, "factors", accepted, given)
        groups = [one if isinstance(one, dict) else {"params": one} for one in given]
        return [group | {"params": _members(group["params"])} for group in groups]

    def _check_parameter(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        if parameter.dim() != 2:
            raise _checks.bad_value(self._name, "factors", "matrices", parameter)

    def _complete(self, group: dict[str, Any]) -> None:
        factors = [p[1] if isinstance(p, tuple) else p for p in _members(group["params"])]
        lora = group["layout"] == "lora"
        if len(factors) not in ((2,) if lora else (1, 2)):
            accepted = "pairs" if lora else "pairs or single parameters"
            raise ValueError(
                f"{self._name}: factors must be {accepted} with layout={group['layout']!r}, "
                f"got {len(factors)} in a group"
            )
        ranks = [p.shape[0 if lora and p is factors[0] else 1] for p in factors]
        if ranks[0] != ranks[-1]:
            raise ValueError(f"{self._name}: factors must be of one rank, got {ranks}")

    def _is_global(self) -> bool:
        return any(len(group["params"]) == 2 for group in self.param_groups)

    def _state_of(self, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """With the states the products of the other factor, before it changes."""
        first, last = group["params"][0], group["params"][-1]
        lora, is_last = group["layout"] == "lora", parameter is last
        other = (first if is_last else last).detach().to(computation_dtype(parameter.dtype))
        gram = _gram(other.mT if lora and is_last else other)
        if _checks.is_distributed(gram):
            gram = gram.full_tensor()  # type: ignore[attr-defined]
        name = "left_gram" if lora and not is_last else "right_gram"
        return super()._state_of(parameter, group) | {name: gram}

    def _numbers(self, group: Numbers) -> dict[str, Any]:
        return {"definite": group["damping"] > 0}

    @staticmethod
    def _update(p: Tensor, g: Tensor, state: dict[str, Tensor], group: Numbers) -> Tensor:
        how = group["damping"], group["definite"]
        if "left_gram" in state:
            change = of_whole(lambda g: _solve(state["left_gram"], g, *how), g)
        else:
            change = of_whole(lambda g: _solve(state["right_gram"], g.mT, *how).mT, g)
        return p - group["lr"] * change


def _members(params: Any) -> list[Any]:
    """The parameters of a group, each a tensor or a pair of a name and a tensor."""
    is_one = not isinstance(params, Iterable) or isinstance(params, Tensor | str)
    if is_one or (isinstance(params, tuple) and params and isinstance(params[0], str)):
        return [params]
    return list(params)
