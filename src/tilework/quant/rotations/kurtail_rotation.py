"""KurTail: the rotation that takes the tails from activations."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tilework import _checks
from tilework._operators import without_autocast
from tilework.quant._arguments import check_finite, computed, rows_of
from tilework.quant.rotations.cayley_adam import CayleyAdam
from tilework.quant.rotations.kurtosis_loss import PAPER, kurtosis_loss

__all__ = ["RotationResult", "kurtail_rotation"]


def check_rotation(name: str, argument: str, rotation: Tensor, width: int) -> None:
    """Refuse what is not an orthogonal matrix of a width, within 1e-4."""
    _checks.floating(name, argument, rotation)
    _checks.shape(name, argument, rotation, (width, width))
    check_finite(name, argument, rotation)
    if _checks.has_values(rotation):
        exact = rotation.double()
        identity = torch.eye(width, dtype=exact.dtype, device=exact.device)
        error = float((exact.mT @ exact - identity).abs().max())
        if error > 1e-4:
            raise ValueError(f"{name}: {argument} must be orthogonal, but is so within {error:.2g}")


@PAPER
class RotationResult(NamedTuple):
    """What :func:`kurtail_rotation` found.

    Args:
        rotation: The orthogonal matrix with the least loss, of shape (d, d).
        losses: The loss before each step, and after the last, of shape (steps + 1,).
        best_step: The step before which the loss was least.

    Example:
        >>> import torch
        >>> from tilework.quant import kurtail_rotation
        >>> kurtail_rotation(torch.randn(8, 4), steps=3).losses.shape
        torch.Size([4])

    Reference:
        Mohammad Sadegh Akhondzadeh, Aleksandar Bojchevski, Evangelos Eleftheriou, Martino Dazzi.
        KurTail: Kurtosis-based LLM Quantization. 2025. arXiv:2503.01483.
    """

    rotation: Tensor
    losses: Tensor
    best_step: int


@PAPER
@without_autocast
def kurtail_rotation(
    input: Tensor,
    *,
    steps: int = 100,
    lr: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    target: float = 1.8,
    initial: Tensor | None = None,
) -> RotationResult:
    r"""The rotation of activations that brings their kurtosis nearest to that of uniform values.

    From ``initial``, :class:`CayleyAdam` takes ``steps`` steps on

    .. math::

        \ell(R) = \texttt{kurtosis\_loss}(X R)

    with the rows :math:`X` of ``input``; the :math:`R` with the least loss is returned, the
    earliest one of several.

    Args:
        input: Activations, of shape (..., d).
        steps: The number of steps, at least 0.
        lr: The step size, at least 0.
        betas: As of :class:`CayleyAdam`.
        target: As of :func:`kurtosis_loss`.
        initial: An orthogonal matrix of shape (d, d); None is the identity.

    Returns:
        The rotation, the losses and the best step, float64 for float64 activations and otherwise
        float32.

    Raises:
        ValueError: ``input`` is empty or not finite, ``initial`` is not orthogonal within 1e-4 or
            of another shape, or an option is not one of those above.
        TypeError: A tensor is not of a real floating dtype, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import kurtail_rotation
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 8)
        >>> x[:, 0] *= 20
        >>> found = kurtail_rotation(x, steps=30)
        >>> bool(found.losses.min() < 0.5 * found.losses[0])
        True

    Deviations:
        The paper leaves the schedule open; steps here are of a constant size, on all rows at once.

    Reference:
        As :class:`RotationResult`.
    """
    name = "kurtail_rotation"
    _checks.floating(name, "input", input)
    if not input.dim():
        raise _checks.bad_value(name, "input", "of shape (..., d)", input)
    rows = rows_of(name, input, input.shape[-1])
    width = rows.shape[1]
    _checks.count(name, "steps", steps, 0)
    _checks.finite(name, "target", target)
    dtype = computed(rows, initial)
    start = torch.eye(width, dtype=dtype, device=rows.device)
    if initial is not None:
        check_rotation(name, "initial", initial, width)
        _checks.same_device(name, input=input, initial=initial)
        start = initial.detach().to(dtype, copy=True)
    rows, rotation = rows.to(dtype), nn.Parameter(start)
    optimizer = CayleyAdam([rotation], lr, betas)
    best, best_step, losses = start.clone(), 0, list[float]()
    for step in range(steps + 1):
        with torch.enable_grad():
            loss = kurtosis_loss(rows @ rotation, target=target)
        losses.append(float(loss.detach()))
        if losses[step] < losses[best_step]:
            best, best_step = rotation.detach().clone(), step
        if step < steps:
            (rotation.grad,) = torch.autograd.grad(loss, rotation)
            optimizer.step()
    return RotationResult(best, torch.tensor(losses, dtype=dtype, device=rows.device), best_step)
