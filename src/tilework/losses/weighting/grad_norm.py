"""Weights of tasks that balance the norms of their gradients."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework._options import StatefulModule, buffer, state
from tilework.catalog import implements
from tilework.losses._classes import class_index

__all__ = ["GradNorm", "grad_norm_loss"]

BETAS, EPS = (0.9, 0.999), 1e-8
_LEAST_WEIGHT = 1e-3
_NAME = "grad_norm_loss"
_PAPER = implements(
    "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks",
    year=2017,
    arxiv="1711.02257",
)


@_PAPER
def grad_norm_loss(
    task_weights: Float[Tensor, " tasks"],
    grad_norms: Float[Tensor, " tasks"],
    loss_ratios: Float[Tensor, " tasks"],
    *,
    alpha: float = 1.5,
) -> Float[Tensor, ""]:
    r"""Distance of the tasks' weighted gradient norms from those that balance their progress.

    With the ``task_weights`` :math:`w`, the ``grad_norms`` :math:`g` of the unweighted losses, the
    ``loss_ratios`` :math:`\rho` of each loss to its first value, and :math:`\alpha` = ``alpha``:

    .. math::

        G_i = w_i \, g_i, \qquad
        \sum_i \Big| G_i - \bar G \, \Big( \frac{\rho_i}{\bar \rho} \Big)^{\alpha} \Big|

    where bars are means over the tasks. The targets are constants: the gradient in :math:`w_i` is
    :math:`\pm g_i`, or 0 where :math:`G_i` is its target.

    Args:
        task_weights: Shape ``(T)``, ``T >= 2``; the only argument with a gradient.
        grad_norms: Norm of each loss's gradient, shape ``(T)``, at least 0.
        loss_ratios: Each loss divided by its first value, shape ``(T)``, at least 0.
        alpha: How strongly slow tasks are pulled, at least 0: 0 makes all targets equal.

    Returns:
        A scalar of the dtype of ``task_weights``, for half precision under autocast float32.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: A tensor is not of a floating dtype.

    Example:
        >>> import torch
        >>> from tilework.losses import grad_norm_loss
        >>> weights = torch.ones(2, requires_grad=True)
        >>> loss = grad_norm_loss(weights, torch.tensor([1.0, 3.0]), torch.ones(2))
        >>> loss.backward()  # both targets are 2
        >>> loss.detach(), weights.grad
        (tensor(2.), tensor([-1.,  3.]))

    Reference:
        Zhao Chen, Vijay Badrinarayanan, Chen-Yu Lee, Andrew Rabinovich. GradNorm: Gradient
        Normalization for Adaptive Loss Balancing in Deep Multitask Networks. 2017.
        arXiv:1711.02257.
    """
    _checks.at_least(_NAME, "alpha", alpha, 0)
    _checks.floating(_NAME, "task_weights", task_weights)
    if task_weights.dim() != 1 or task_weights.shape[0] < 2:
        raise _checks.bad_value(_NAME, "task_weights", "of shape (T), T >= 2", task_weights)
    for argument, tensor in (("grad_norms", grad_norms), ("loss_ratios", loss_ratios)):
        _checks.floating(_NAME, argument, tensor)
        _checks.shape(_NAME, argument, tensor, task_weights.shape)
    _checks.same_device(
        _NAME, task_weights=task_weights, grad_norms=grad_norms, loss_ratios=loss_ratios
    )
    dtype = computation_dtype(task_weights.dtype)
    norms, ratios = grad_norms.detach().to(dtype), loss_ratios.detach().to(dtype)
    weighted = task_weights.to(dtype) * norms
    target = weighted.detach().mean() * (ratios / ratios.mean()) ** alpha
    return (weighted - target).abs().sum().to(class_index.result_dtype(task_weights))


@_PAPER
class GradNorm(StatefulModule):
    r"""Weighted sum of tasks' losses, whose weights learn to balance their gradients.

    A call returns :math:`\sum_i w_i \ell_i` with the current ``weights`` :math:`w`, at first 1, to
    call ``backward`` on. In training, with gradients enabled, it then moves the weights for the
    next call: one step of Adam (``betas`` of 0.9 and 0.999, ``eps`` of 1e-8) on
    :func:`grad_norm_loss`, with the gradients of the losses in ``shared_parameters`` and the losses
    divided by ``initial_losses``; then

    .. math::

        w \leftarrow \max(w, 10^{-3}), \qquad w \leftarrow T \, w \, / \sum_i w_i

    The gradients of the network's parameters stay untouched. The weights, the state of Adam and
    ``initial_losses`` are buffers, so that a restored module continues exactly. A loss or gradient
    that is not finite shows in the result, and its call leaves all of these alone. The module
    differentiates inside of its call, which ``torch.compile`` and ``torch.func`` do not trace; each
    process has weights of its own.

    Args:
        num_tasks: The number ``T`` of tasks, at least 2.
        alpha: How strongly slow tasks are pulled, at least 0.
        lr: Learning rate of the weights, above 0.
        initial_losses: The losses that progress is measured against, above 0, shape ``(T)``; None
            takes those of the first call in which all are finite and above 0, before which the
            weights stay.

    Raises:
        ValueError: An option or shape is not one of those above, the losses are not ``T`` scalars
            with a graph, or there is no shared parameter that requires a gradient.
        TypeError: A loss is not of a floating dtype.

    Example:
        >>> import torch
        >>> from tilework.losses import GradNorm
        >>> shared = torch.ones(3, requires_grad=True)
        >>> criterion = GradNorm(2)
        >>> loss = criterion([shared.sum(), 10 * shared.sum()], [shared])
        >>> loss.backward()
        >>> criterion.weights  # the second task pulled harder
        tensor([1.0250, 0.9750])

    Deviations:
        A common implementation takes a softmax of free parameters as weights: here they are free,
        clamped and scaled, as in the paper. The bound of 1e-3 is not in the paper, whose weights
        could become negative.

    Reference:
        As :func:`grad_norm_loss`.
    """

    num_tasks: int = field(kw_only=False)
    alpha: float = 1.5
    lr: float = 0.025
    initial_losses: Tensor | Sequence[float] | None = buffer(default=None, exact=True)
    weights: Tensor = state(lambda self: _filled(self, 1.0))
    exp_avg: Tensor = state(lambda self: _filled(self, 0.0))
    exp_avg_sq: Tensor = state(lambda self: _filled(self, 0.0))
    step: Tensor = state(lambda self: torch.zeros((), dtype=torch.int64))

    def __post_init__(self) -> None:
        given = self.initial_losses
        if given is not None and not isinstance(given, Tensor):
            given = torch.tensor(given, dtype=_dtype(), device="cpu")
        self._given = None if given is None else given.detach().to(_dtype(), copy=True)
        del self.initial_losses  # may have become a parameter
        self.initial_losses = self._given
        super().__post_init__()
        self._start()

    def reset_parameters(self) -> None:
        """Make the states as they were at first, ``initial_losses`` those that were given."""
        super().reset_parameters()
        self._start()

    def _start(self) -> None:
        given = self._given
        self.initial_losses = None if given is None else given.to(self.weights, copy=True)

    def _check(self) -> None:
        _checks.count("GradNorm", "num_tasks", self.num_tasks, 2)
        _checks.at_least("GradNorm", "alpha", self.alpha, 0)
        _checks.positive("GradNorm", "lr", self.lr)
        if isinstance(self.initial_losses, Tensor):
            shape = (self.num_tasks,)
            _checks.shape("GradNorm", "initial_losses", self.initial_losses, shape)
            if _checks.holds_values(self.initial_losses):
                for index, value in enumerate(self.initial_losses.tolist()):
                    _checks.positive("GradNorm", f"initial_losses[{index}]", value)

    def forward(
        self, losses: Tensor | Sequence[Tensor], shared_parameters: Tensor | Iterable[Tensor]
    ) -> Tensor:
        """Return the weighted sum, then move the weights if in training.

        Args:
            losses: ``T`` scalars or a tensor of shape ``(T)``, with their graph.
            shared_parameters: The parameters of the last layer that the tasks share.

        Returns:
            A scalar of the dtype of the losses.
        """
        scalars = self._scalars(losses)
        values = torch.stack(scalars)
        ratios = self._ratios(values.detach().to(self.weights))
        dtype = computation_dtype(values.dtype)
        total = (self.weights.to(dtype, copy=True) * values.to(dtype)).sum()
        if self.training and torch.is_grad_enabled():
            self._move_weights(scalars, ratios, self._shared(shared_parameters))
        return total.to(class_index.result_dtype(values))

    def _ratios(self, losses: Tensor) -> Tensor:
        """The losses to their first values, nan until there are some."""
        if self.initial_losses is None:
            with torch.inference_mode(False):  # it is moved outside of it too
                self.initial_losses = torch.full_like(losses, torch.nan)
        first = self.initial_losses
        assert isinstance(first, Tensor)
        suits = ((losses > 0) & losses.isfinite()).all()
        first.copy_(losses.where(suits & first.isnan(), first))
        return losses / first

    def _move_weights(self, losses: list[Tensor], ratios: Tensor, shared: list[Tensor]) -> None:
        norms = torch.stack([self._gradient_norm(loss, shared) for loss in losses])
        weights = self.weights.clone().requires_grad_()
        loss = grad_norm_loss(weights, norms, ratios, alpha=self.alpha)
        (gradient,) = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            step = self.step + 1
            mean = self.exp_avg.lerp(gradient, 1 - BETAS[0])
            square = self.exp_avg_sq.lerp(gradient.square(), 1 - BETAS[1])
            length = (square / _share(BETAS[1], step, square.dtype)).sqrt() + EPS
            moved = self.weights - self.lr * mean / _share(BETAS[0], step, mean.dtype) / length
            moved = moved.clamp(min=_LEAST_WEIGHT)
            moved = self.num_tasks * moved / moved.sum()
            came = torch.cat([ratios, norms])
            self._move(came, step=step, exp_avg=mean, exp_avg_sq=square, weights=moved)

    def _gradient_norm(self, loss: Tensor, shared: list[Tensor]) -> Tensor:
        """The norm of all gradients together."""
        gradients = torch.autograd.grad(
            loss, shared, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        norms = [torch.linalg.vector_norm(g.to(self.weights)) for g in gradients]
        together: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return together

    def _scalars(self, losses: Tensor | Sequence[Tensor]) -> list[Tensor]:
        if isinstance(losses, Tensor):
            _checks.shape("GradNorm", "losses", losses, (self.num_tasks,))
        scalars = list(losses)
        if len(scalars) != self.num_tasks:
            accepted = f"{self.num_tasks} scalars or a tensor of shape ({self.num_tasks},)"
            raise ValueError(f"GradNorm: losses must be {accepted}, got {len(scalars)}")
        for index, loss in enumerate(scalars):
            _checks.floating("GradNorm", f"losses[{index}]", loss)
            _checks.shape("GradNorm", f"losses[{index}]", loss, ())
            if self.training and torch.is_grad_enabled() and not loss.requires_grad:
                raise ValueError(f"GradNorm: losses[{index}] must have a graph, got a constant")
        return scalars

    def _shared(self, parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
        shared = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if not shared or not all(isinstance(p, Tensor) and p.requires_grad for p in shared):
            accepted = "at least one tensor, all of which require a gradient"
            raise _checks.bad_value("GradNorm", "shared_parameters", accepted, shared)
        return shared

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The first call makes this buffer: a state may have it where the module has not yet.
        if f"{prefix}weights" in state_dict:
            started = f"{prefix}initial_losses" in state_dict
            self.initial_losses = torch.empty_like(self.weights) if started else None
        super()._load_from_state_dict(state_dict, prefix, *args)


def _dtype() -> torch.dtype:
    return computation_dtype(torch.get_default_dtype())


def _filled(module: GradNorm, value: float) -> Tensor:
    return torch.full((module.num_tasks,), value, dtype=_dtype())


def _share(beta: float, step: Tensor, dtype: torch.dtype) -> Tensor:
    """What the weights of a running mean have summed to since it was 0."""
    return -torch.expm1(step.to(dtype) * math.log(beta))
