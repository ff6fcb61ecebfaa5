"""Optimizer steps during the backward pass, as each gradient is ready."""

from collections import Counter

import torch
from torch import Tensor

from tilework import _checks
from tilework.catalog import without_paper
from tilework.optim._optimizer import Optimizer, step

__all__ = ["step_in_backward"]


class Handle:
    """What :func:`step_in_backward` returns."""

    def __init__(self, optimizer: Optimizer, accumulate: int) -> None:
        self._optimizer = optimizer
        self._accumulate = accumulate
        self._passes: Counter[Tensor] = Counter()
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._step)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]
        optimizer._in_backward = True

    @torch.no_grad()
    def _step(self, parameter: Tensor) -> None:
        self._passes[parameter] += 1
        if self._passes[parameter] % self._accumulate == 0:
            step.take(self._optimizer, [parameter])
            parameter.grad = None

    def remove(self) -> None:
        """Have ``step`` and ``zero_grad`` of the optimizer do again what they did."""
        for hook in self._hooks:
            hook.remove()
        self._optimizer._in_backward = False


@without_paper("A way to run optimizers, also called gradient release.")
def step_in_backward(optimizer: Optimizer, *, accumulate: int = 1) -> Handle:
    """Update each parameter in the backward pass, and free its gradient at once.

    With the ``accumulate``-th gradient of a parameter the optimizer takes its step for it, and the
    gradient is None again: no more than one gradient is stored at a time. Meanwhile ``step`` and
    ``zero_grad`` of the optimizer do nothing, so that schedulers and trainers keep working. The
    parameters go the way that ``step`` after ``accumulate`` backward passes would take them.

    Args:
        optimizer: One of this library, whose rule needs no other parameters.
        accumulate: Backward passes for each step, at least 1.

    Returns:
        A handle with ``remove()``.

    Raises:
        ValueError: The step of one parameter needs the gradients of all; or the steps are in the
            backward pass already.
        TypeError: ``optimizer`` is not of this library.

    Example:
        >>> import torch
        >>> from tilework.optim import Lion, step_in_backward
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        >>> handle = step_in_backward(Lion([weight], lr=0.1))
        >>> weight.square().sum().backward()
        >>> weight.data
        tensor([ 0.9000, -1.9000,  2.9000])
        >>> weight.grad is None
        True

    Deviations:
        Clipping by the norm of all gradients has no effect: there is never more than one.

    Reference:
        torch.optim.Optimizer, and ``torch.Tensor.register_post_accumulate_grad_hook``.
    """
    name = "step_in_backward"
    if not isinstance(optimizer, Optimizer):
        raise _checks.bad_type(name, "optimizer", "an optimizer of tilework.optim", optimizer)
    _checks.count(name, "accumulate", accumulate)
    if optimizer._is_global():
        raise ValueError(
            f"{name}: optimizer must update each parameter by its own gradient, got "
            f"{type(optimizer).__name__}, whose step needs those of all"
        )
    if optimizer._in_backward:
        raise ValueError(f"{name}: optimizer must not step in the backward pass already")
    return Handle(optimizer, int(accumulate))
