"""Adam on orthogonal matrices."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import implements
from tilework.quant._arguments import computed

__all__ = ["CayleyAdam"]


@implements(
    "Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform",
    year=2020,
    arxiv="2002.01113",
)
class CayleyAdam(torch.optim.Optimizer):
    r"""Adam for orthogonal matrices, which stay so.

    For each square matrix :math:`R`, also of a stack, with its gradient :math:`G`, in step
    :math:`t`:

    .. math::

        m \leftarrow \beta_1 m + (1 - \beta_1) G, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) \lVert G \rVert_F^2, \qquad
        D = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \texttt{eps}}

    .. math::

        A = D R^\top - R D^\top, \qquad
        R \leftarrow \left( \mathbb 1 + \tfrac \eta 2 A \right)^{-1}
        \left( \mathbb 1 - \tfrac \eta 2 A \right) R

    with ``lr`` :math:`\eta`. The second moment is one number for each matrix.

    Args:
        params: Orthogonal parameters of shape (..., n, n), or groups of them.
        lr: The step size, at least 0.
        betas: What both moments keep of themselves, each from 0 to below 1.
        eps: Above 0.
        maximize: Whether the objective is maximized.

    Raises:
        ValueError: A parameter is not square in its last two dimensions, or an option is not one of
            those above.
        TypeError: A parameter is not of a real floating dtype, a gradient is sparse, or an option
            of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import CayleyAdam
        >>> rotation = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = CayleyAdam([rotation], lr=0.1)
        >>> rotation[0, 1].backward()
        >>> optimizer.step()
        >>> rotation.data
        tensor([[ 0.9950, -0.0998],
                [ 0.0998,  0.9950]])

    Deviations:
        The paper has an iteration in the place of the inverse; its moments are moved to the new
        tangent space. Steps here are exactly orthogonal, up to rounding.

    Reference:
        Jun Li, Li Fuxin, Sinisa Todorovic. Efficient Riemannian Optimization on the Stiefel
        Manifold via the Cayley Transform. 2020. arXiv:2002.01113.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        maximize: bool = False,
    ) -> None:
        plain = _checks.plain
        defaults = {
            "lr": plain(lr),
            "betas": tuple(map(plain, betas)),
            "eps": plain(eps),
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own.

        Args:
            param_group: ``params``, and the options that are not the defaults.

        Raises:
            ValueError: A parameter is not square, or an option is not one that is accepted.
            TypeError: A parameter is not of a real floating dtype, or an option of a wrong type.
        """
        name = type(self).__name__
        options = self.defaults | {k: v for k, v in param_group.items() if k != "params"}
        _checks.at_least(name, "lr", options["lr"], 0)
        if not isinstance(options["betas"], tuple | list) or len(options["betas"]) != 2:
            raise _checks.bad_type(name, "betas", "a pair of numbers", options["betas"])
        for beta in options["betas"]:
            if not 0 <= _checks.number(name, "betas", beta) < 1:
                raise _checks.bad_value(name, "betas", "numbers from 0 to below 1", beta)
        _checks.positive(name, "eps", options["eps"])
        super().add_param_group(param_group)
        try:
            for parameter in self.param_groups[-1]["params"]:
                _checks.floating(name, "params", parameter)
                if parameter.dim() < 2 or parameter.shape[-1] != parameter.shape[-2]:
                    raise _checks.bad_value(name, "params", "of shape (..., n, n)", parameter)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step.

        Args:
            closure: Computes the loss anew, with its gradients; None if they are there.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            TypeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            raise _checks.bad_type(type(self).__name__, "gradient", "dense", gradient.layout)
        dtype = computed(parameter)
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = parameter.new_zeros(parameter.shape[:-2], dtype=dtype)
        state["step"] += 1
        gradient = gradient.to(dtype)
        _cayley_step(
            parameter,
            -gradient if group["maximize"] else gradient,
            state,
            group["lr"],
            group["betas"],
            group["eps"],
        )


@without_autocast
def _cayley_step(
    parameter: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    count = float(state["step"])
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - betas[0])
    square.lerp_(gradient.square().sum((-2, -1)), 1 - betas[1])
    root = (square / (1 - betas[1] ** count)).sqrt() + eps
    direction = mean / (1 - betas[0] ** count) / root[..., None, None]
    old = parameter.to(mean.dtype)
    skew = direction @ old.mT
    skew = skew - skew.mT
    identity = torch.eye(old.shape[-1], dtype=old.dtype, device=old.device)
    half = lr / 2
    parameter.copy_(torch.linalg.solve(identity + half * skew, (identity - half * skew) @ old))
