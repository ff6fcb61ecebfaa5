"""Norm tweaking: the norms of a quantized block are trained on its float outputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tilework import _checks
from tilework.quant._norms import NORMS
from tilework.quant.matching.distribution_loss import PAPER, distribution_loss

__all__ = ["norm_tweaking_", "norm_tweaking_lr"]

TRAINED = (*NORMS, nn.GroupNorm)


@PAPER
def norm_tweaking_lr(layer: int, num_layers: int, *, lr: float = 1e-5, scale: float = 5.0) -> float:
    r"""The learning rate of a block, which rises with its depth.

    .. math::

        \texttt{lr} \left( 1 + \texttt{scale} \cdot \frac{\texttt{layer}}{\texttt{num\_layers}}
        \right)

    Args:
        layer: The place of the block, from 0.
        num_layers: The number of blocks.
        lr: The rate of the first block, at least 0.
        scale: How much it rises, at least 0.

    Returns:
        The rate.

    Raises:
        ValueError: ``layer`` is not from 0 to below ``num_layers``, or a number below 0.
        TypeError: A number is of a wrong type.

    Example:
        >>> from tilework.quant import norm_tweaking_lr
        >>> [norm_tweaking_lr(layer, 2, lr=1.0) for layer in range(2)]
        [1.0, 3.5]

    Reference:
        As :func:`distribution_loss`.
    """
    name = "norm_tweaking_lr"
    _checks.count(name, "num_layers", num_layers)
    if not 0 <= _checks.integer(name, "layer", layer) < num_layers:
        raise _checks.bad_value(name, "layer", f"an int from 0 to {num_layers - 1}", layer)
    _checks.at_least(name, "lr", lr, 0)
    _checks.at_least(name, "scale", scale, 0)
    return float(lr * (1 + scale * layer / num_layers))


def _first(block: nn.Module, input: Tensor) -> Tensor:
    output = block(input)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


@PAPER
def norm_tweaking_(
    block: nn.Module,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    lr: float = 1e-5,
    iterations: int = 1,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> list[float]:
    r"""Train the norms of a quantized block until its outputs have the float block's statistics.

    For ``iterations`` passes over the batches, a step of Adam on :func:`distribution_loss` of the
    block's outputs and ``targets``. Everything else of the block stays as it was: other
    parameters, what requires gradients, the gradients that are there, the mode.

    Args:
        block: A block with norms of torch or of :mod:`tilework.norms` that have parameters.
        inputs: Its inputs, batch by batch.
        targets: What the float block gives of them.
        lr: The learning rate, at least 0; see :func:`norm_tweaking_lr`.
        iterations: Passes over all batches, at least 1.
        forward: The output of a block for an input; None is ``block(input)``, or its first element
            if it is a tuple.

    Returns:
        The loss before each step.

    Raises:
        ValueError: ``block`` has no parameters of norms, ``inputs`` and ``targets`` are not as
            many, or a number is out of its range.
        TypeError: ``block`` is not a module, or a number of a wrong type.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tilework.quant import norm_tweaking_
        >>> _ = torch.manual_seed(0)
        >>> block, x = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), torch.randn(64, 4)
        >>> losses = norm_tweaking_(block, [x], [block(x) + 0.5], lr=1e-2, iterations=20)
        >>> losses[-1] < losses[0]
        True

    Reference:
        As :func:`distribution_loss`.
    """
    name = "norm_tweaking_"
    if not isinstance(block, nn.Module):
        raise _checks.bad_type(name, "block", "a module", block)
    if len(inputs) != len(targets):
        accepted = f"a sequence of {len(inputs)}, as inputs is"
        raise _checks.bad_value(name, "targets", accepted, len(targets))
    _checks.at_least(name, "lr", lr, 0)
    _checks.count(name, "iterations", iterations)
    norms = [module for module in block.modules() if isinstance(module, TRAINED)]
    trained = dict.fromkeys(p for norm in norms for p in norm.parameters(recurse=False))
    if not trained:
        raise ValueError(f"{name}: block must have norms with parameters, but has none")
    before = [(p, p.requires_grad, p.grad) for p in block.parameters()]
    losses: list[float] = []
    try:
        for parameter in block.parameters():
            parameter.requires_grad_(parameter in trained)
            parameter.grad = None
        optimizer = torch.optim.Adam(list(trained), lr)
        for _ in range(iterations):
            for input, target in zip(inputs, targets, strict=True):
                losses.append(_step(block, input, target, forward or _first, optimizer))
    finally:
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
    return losses


def _step(
    block: nn.Module, input: Tensor, target: Tensor, forward: Any, optimizer: torch.optim.Optimizer
) -> float:
    optimizer.zero_grad()
    with torch.enable_grad():
        loss = distribution_loss(forward(block, input), target)
        loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())
