"""Mixup: mixed inputs, and the cross-entropy with both of their targets."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tilework import _checks, _torch
from tilework._operators import computation_dtype
from tilework.catalog import implements
from tilework.losses._classes import class_index

__all__ = ["MixupBatch", "mixup_batch", "mixup_cross_entropy"]

_PAPER = implements(
    "On the Limitations of Temperature Scaling for Distributions with Overlaps",
    year=2023,
    arxiv="2306.00740",
)


@_PAPER
def mixup_cross_entropy(
    input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."],
    mixed_target: Int64[Tensor, "..."],
    lam: float | Float[Tensor, "..."],
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Float[Tensor, "..."]:
    r"""Cross-entropy with two targets, in the proportion in which inputs were mixed.

    With the cross-entropy :math:`\mathrm{CE}_i(y)` of ``F.cross_entropy`` between the logits of a
    position of ``input`` and a class, the classes :math:`y_i` in ``target`` and :math:`y'_i` in
    ``mixed_target``, and :math:`\lambda` = ``lam``:

    .. math::

        \ell_i = \lambda \, \mathrm{CE}_i(y_i) + (1 - \lambda) \, \mathrm{CE}_i(y'_i)

    A position is ignored where either target is. ``"mean"`` is over the kept positions.

    Args:
        input: Logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: Classes, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``.
        mixed_target: Classes of the inputs that were mixed in, the shape of ``target``.
        lam: The part of ``target``, from 0 to 1: a number, a scalar tensor, or shape ``(N)``.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: The part of the targets, from 0 to 1, that is spread evenly over the
            classes.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target`` with zeros where ignored; of the dtype
        of ``input``, for half precision under autocast float32. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape or option is not one of those above; on the CPU, a value of ``lam`` is
            not from 0 to 1. Elsewhere its loss is nan.
        TypeError: A tensor is of a wrong dtype.
        IndexError: On the CPU, a target of a kept position is no class. Elsewhere its loss is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import mixup_cross_entropy
        >>> input = torch.tensor([[2.0, 0.0]])
        >>> mixup_cross_entropy(input, torch.tensor([0]), torch.tensor([1]), 0.75)
        tensor(0.6269)

    Deviations:
        ``ignore_index`` and ``label_smoothing`` are those of ``F.cross_entropy``; the paper has
        neither.

    Reference:
        Muthu Chidambaram, Rong Ge. On the Limitations of Temperature Scaling for Distributions with
        Overlaps. 2023. arXiv:2306.00740.
    """
    name = "mixup_cross_entropy"
    class_index.check_options(name, ignore_index, reduction)
    _checks.fraction(name, "label_smoothing", label_smoothing)
    class_index.check_input(name, "input", input)
    dim = class_index.class_dim(input)
    shape = (*input.shape[:dim], *input.shape[dim + 1 :])
    for argument, classes in (("target", target), ("mixed_target", mixed_target)):
        class_index.check_target(name, argument, classes, shape)
    _checks.same_device(name, input=input, target=target, mixed_target=mixed_target)
    part = _part(name, lam, input, len(shape))

    ignored = (target == ignore_index) | (mixed_target == ignore_index)
    target = target.masked_fill(ignored, ignore_index)
    mixed_target = mixed_target.masked_fill(ignored, ignore_index)
    first = class_index.positions(name, input, target, ignore_index)
    second = class_index.positions(name, first.logits, mixed_target, ignore_index)
    log_probs = second.logits.log_softmax(dim)
    losses = -part * first.at_target(log_probs) - (1 - part) * second.at_target(log_probs)
    if label_smoothing:
        uniform = -log_probs.mean(dim)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    return first.reduce(losses, reduction)


def _part(name: str, lam: float | Tensor, input: Tensor, positions: int) -> float | Tensor:
    """The checked ``lam``, in a shape that broadcasts against that many dimensions."""
    if not isinstance(lam, Tensor):
        _checks.fraction(name, "lam", lam)
        return lam
    _checks.floating(name, "lam", lam)
    if lam.dim() and (not positions or lam.shape != input.shape[:1]):
        accepted = f"a number, a scalar or of shape {tuple(input.shape[: min(positions, 1)])}"
        raise _checks.bad_value(name, "lam", accepted, lam)
    _checks.same_device(name, input=input, lam=lam)
    part = _checks.fractions(name, "lam", lam).to(computation_dtype(input.dtype))
    return part.reshape(*lam.shape, *[1] * (positions - lam.dim()))


@_PAPER
class MixupBatch(NamedTuple):
    """What :func:`mixup_batch` returns; all but ``index`` are for :func:`mixup_cross_entropy`.

    Args:
        input: The mixed inputs, of the shape and dtype of the inputs; for the model.
        target: The targets as they came.
        mixed_target: The targets of the inputs that were mixed in.
        lam: The part of ``target``, a scalar of the dtype of the inputs.
        index: Which inputs were mixed in, int64 of shape ``(N)``.

    Example:
        >>> import torch
        >>> from tilework.losses import mixup_batch
        >>> mixup_batch(torch.ones(4, 2), torch.arange(4)).target
        tensor([0, 1, 2, 3])

    Reference:
        As :func:`mixup_cross_entropy`.
    """

    input: Tensor
    target: Tensor
    mixed_target: Tensor
    lam: Tensor
    index: Tensor  # type: ignore[assignment]


@_PAPER
def mixup_batch(
    input: Float[Tensor, "batch ..."],
    target: Tensor,
    *,
    alpha: float = 1.0,
    generator: torch.Generator | None = None,
) -> MixupBatch:
    r"""Mix each input of a batch with another one, all in the same proportion.

    With a permutation :math:`\pi` of the batch, all of them equally likely, and :math:`\alpha` =
    ``alpha``:

    .. math::

        \lambda \sim \mathrm{Beta}(\alpha, \alpha), \qquad
        \tilde x_i = \lambda x_i + (1 - \lambda) x_{\pi(i)}

    Args:
        input: Inputs of a model, shape ``(N, ...)``.
        target: Their targets, shape ``(N, ...)``.
        alpha: At least 0: 0 mixes nothing, 1 draws :math:`\lambda` uniformly.
        generator: Draws both; None takes the default one of the inputs' device.

    Returns:
        The mixed inputs, both targets, :math:`\lambda` and the permutation.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``input`` is not of a floating dtype, or ``target`` is no tensor.

    Example:
        >>> import torch
        >>> from tilework.losses import mixup_batch, mixup_cross_entropy
        >>> input, target = torch.randn(8, 5), torch.randint(3, (8,))
        >>> mixed = mixup_batch(input, target, generator=torch.Generator().manual_seed(0))
        >>> logits = torch.nn.Linear(5, 3)(mixed.input)
        >>> loss = mixup_cross_entropy(logits, mixed.target, mixed.mixed_target, mixed.lam)

    Reference:
        As :func:`mixup_cross_entropy`.
    """
    name = "mixup_batch"
    _checks.at_least(name, "alpha", alpha, 0)
    _checks.floating(name, "input", input)
    if input.dim() == 0:
        raise _checks.bad_value(name, "input", "of shape (N, ...)", input)
    if not isinstance(target, Tensor):
        raise _checks.bad_type(name, "target", "a tensor", target)
    if target.dim() == 0 or target.shape[0] != input.shape[0]:
        raise _checks.bad_value(name, "target", f"of shape ({input.shape[0]}, ...)", target)
    _checks.same_device(name, input=input, target=target)
    device = input.device if generator is None else generator.device
    lam = _beta(alpha, device, generator).to(input.device, input.dtype)
    # Only where there is one, as this fixes a symbolic size.
    given: Any = {} if generator is None else {"generator": generator}
    index = torch.randperm(input.shape[0], device=device, **given).to(input.device)
    dtype = computation_dtype(input.dtype)
    values, part = input.to(dtype), lam.to(dtype)
    mixed = (part * values + (1 - part) * values[index]).to(input.dtype)
    return MixupBatch(mixed, target, target[index], lam, index)


def _beta(alpha: float, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A draw of Beta(alpha, alpha), exact also where both gamma variables underflow.

    A gamma variable of shape a is one of shape a + 1 times a uniform one to the power 1 / a.
    """
    if alpha == 0:
        return torch.ones((), dtype=torch.float64, device=device)
    shape = torch.full((2,), alpha + 1.0, dtype=torch.float64, device=device)
    logs = _torch.standard_gamma(shape, generator).log()
    logs -= torch.empty_like(logs).exponential_(generator=generator) / alpha
    return (logs[0] - logs[1]).sigmoid()
