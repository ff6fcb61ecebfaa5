"""Cross-entropy with the penalty on the squared log-partition function beside it."""

from dataclasses import InitVar, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tilework import _checks
from tilework._implementations import TABLES
from tilework._options import OptionsModule, buffer
from tilework.catalog import implements
from tilework.losses._classes import class_index, logits
from tilework.losses._classes.class_index import Positions
from tilework.losses._classes.cross_entropy import cross_entropy
from tilework.losses._classes.positions import of_logits

__all__ = ["CrossEntropyWithZLoss", "cross_entropy_with_z_loss"]

_NAME = "cross_entropy_with_z_loss"
TABLES[f"losses.{_NAME}"] = logits.IMPLEMENTATIONS
_PAPER = implements(
    "Small-scale proxies for large-scale Transformer training instabilities",
    year=2023,
    arxiv="2309.14322",
)


@_PAPER
def cross_entropy_with_z_loss(
    input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."] | Float[Tensor, "..."],
    weight: Float[Tensor, " classes"] | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 1e-4,
) -> Float[Tensor, "..."]:
    r"""``F.cross_entropy`` plus a penalty on the squared log-sum-exp of the logits.

    With the logits :math:`z_i` of a position of ``input``, :math:`\zeta` = ``z_loss`` and the
    weighted, smoothed cross-entropy :math:`\mathrm{CE}_i` of ``F.cross_entropy``:

    .. math::

        \ell_i = \mathrm{CE}_i + \zeta \Big( \log \sum_v \exp z_{iv} \Big)^2

    Class weights do not multiply the penalty. ``"mean"`` divides the whole sum by the summed class
    weights of the kept targets; for probabilities as targets, by the number of positions.

    Args:
        input: Logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: Classes, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``; or probabilities of the
            classes, of the shape of ``input`` and any floating dtype.
        weight: A weight for each class, shape ``(C)``; a constant.
        ignore_index: Targets of this value do not count; for classes only.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: The part of the target, from 0 to 1, that is spread evenly over the
            classes.
        z_loss: Coefficient of the penalty, at least 0.

    Returns:
        A scalar, or for ``"none"`` one number for each position with zeros where ignored; of the
        dtype of ``input``, for half precision under autocast float32. ``"mean"`` over nothing is
        nan.

    Raises:
        ValueError: A shape or option is not one of those above, ``weight`` requires a gradient, or
            ``ignore_index`` is a class and the targets are probabilities.
        TypeError: ``input`` is not of a floating dtype, or ``target`` is neither that nor int64.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import cross_entropy_with_z_loss
        >>> input, target = torch.zeros(4, 10), torch.tensor([1, 2, 3, -100])
        >>> cross_entropy_with_z_loss(input, target, z_loss=1.0)  # log(10) + log(10)**2
        tensor(7.6045)

    Deviations:
        The paper has neither class weights nor smoothing; they are those of ``F.cross_entropy``,
        and leave the penalty alone.

    Reference:
        Mitchell Wortsman, Peter J. Liu, Lechao Xiao, and others. Small-scale proxies for
        large-scale Transformer training instabilities. 2023. arXiv:2309.14322.
    """
    _check_options(ignore_index, reduction, label_smoothing, z_loss)
    class_index.check_input(_NAME, "input", input)
    soft_shape = tuple(input.shape)
    dim = class_index.class_dim(input)
    class_index.check_target(
        _NAME, "target", target, soft_shape[:dim] + soft_shape[dim + 1 :], soft=soft_shape
    )
    if not target.is_floating_point():
        positions = of_logits(_NAME, input, target, ignore_index, weight=weight)
        return cross_entropy(positions, reduction, label_smoothing, z_loss)
    soft, likelihood = _soft(input, target, weight, ignore_index, label_smoothing)
    log_sum = torch.logsumexp(soft.logits, soft.dim)
    return soft.reduce(likelihood + z_loss * log_sum.square(), reduction)


def _soft(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Positions, Tensor]:
    """The positions, and their cross-entropy with probabilities as targets."""
    positions = class_index.positions(_NAME, input, None, ignore_index, weight=weight)
    _checks.same_device(_NAME, input=input, target=target, weight=weight)
    if ignore_index >= 0:
        accepted = "negative where the targets are probabilities"
        raise _checks.bad_value(_NAME, "ignore_index", accepted, ignore_index)
    target = (1 - label_smoothing) * target.to(positions.logits.dtype)
    target = target + label_smoothing / input.shape[positions.dim]
    if positions.class_weight is not None:
        target = target * positions.class_weight
    return positions, -(target * positions.logits.log_softmax(positions.dim)).sum(positions.dim)


@_PAPER
class CrossEntropyWithZLoss(OptionsModule):
    """:func:`cross_entropy_with_z_loss` as a module, in place of ``nn.CrossEntropyLoss``.

    It takes the arguments of that class in its order, of which the old ``size_average`` and
    ``reduce`` must be None.

    Example:
        >>> import torch
        >>> from tilework.losses import CrossEntropyWithZLoss
        >>> criterion = CrossEntropyWithZLoss(label_smoothing=0.1)
        >>> criterion(torch.zeros(4, 10), torch.tensor([1, 2, 3, 4]))
        tensor(2.3031)
    """

    weight: Tensor | None = buffer(default=None, kw_only=False)
    size_average: InitVar[None] = field(default=None, kw_only=False)
    ignore_index: int = field(default=-100, kw_only=False)
    reduce: InitVar[None] = field(default=None, kw_only=False)
    reduction: str = field(default="mean", kw_only=False)
    label_smoothing: float = field(default=0.0, kw_only=False)
    z_loss: float = 1e-4

    def __post_init__(self, size_average: None, reduce: None) -> None:
        for argument, value in (("size_average", size_average), ("reduce", reduce)):
            if value is not None:
                accepted = "None, as reduction says what it did"
                raise _checks.bad_value(_NAME, argument, accepted, value)
        super().__post_init__()

    def options(self) -> dict[str, Any]:
        """Return the options of the function as they are now, also those that are positional."""
        names = ("ignore_index", "reduction", "label_smoothing")
        return {name: getattr(self, name) for name in names} | super().options()

    def _check(self) -> None:
        _check_options(**self.options())

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss; shapes as in :func:`cross_entropy_with_z_loss`."""
        return cross_entropy_with_z_loss(input, target, self.weight, **self.options())


def _check_options(
    ignore_index: int, reduction: str, label_smoothing: float, z_loss: float
) -> None:
    class_index.check_options(_NAME, ignore_index, reduction)
    _checks.fraction(_NAME, "label_smoothing", label_smoothing)
    _checks.at_least(_NAME, "z_loss", z_loss, 0)
