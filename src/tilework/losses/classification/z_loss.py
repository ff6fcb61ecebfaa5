"""The penalty on the squared log-partition function of the logits."""

from jaxtyping import Float, Int64
from torch import Tensor

from tilework import _checks
from tilework._implementations import TABLES
from tilework._options import OptionsModule
from tilework.catalog import implements
from tilework.losses._classes import class_index, linear, logits
from tilework.losses._classes.positions import of_head, of_logits
from tilework.losses._classes.sharding import VocabShard
from tilework.losses._classes.statistics import Rows, Statistics, formula

__all__ = ["ZLoss", "linear_z_loss", "z_loss"]

_NAME = "z_loss"
_LINEAR = "linear_z_loss"
TABLES |= {f"losses.{_NAME}": logits.IMPLEMENTATIONS, f"losses.{_LINEAR}": linear.IMPLEMENTATIONS}
_PAPER = implements(
    "Small-scale proxies for large-scale Transformer training instabilities",
    year=2023,
    arxiv="2309.14322",
)


@_PAPER
def z_loss(
    input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."] | None = None,
    *,
    coefficient: float = 1e-4,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Penalty on the squared log-sum-exp of the logits, which keeps it near 0.

    With the logits :math:`z_i` of a position of ``input`` and :math:`\zeta` = ``coefficient``:

    .. math::

        \ell_i = \zeta \Big( \log \sum_v \exp z_{iv} \Big)^2

    ``"mean"`` is the mean over the kept positions: of squares, not the square of a mean.

    Args:
        input: Logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: Classes, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``, which say only which
            positions are ignored; None keeps all.
        coefficient: What the squares are multiplied by, at least 0.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` one number for each position with zeros where ignored; of the
        dtype of ``input``, for half precision under autocast float32. ``"mean"`` over nothing is
        nan.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``input`` is not of a floating dtype, or ``target`` is not int64.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import z_loss
        >>> z_loss(torch.zeros(4, 10), coefficient=1.0)  # log(10)**2
        tensor(5.3019)

    Deviations:
        A part of a training loss in the paper, which does not say how ignored positions count: here
        not at all. :func:`cross_entropy_with_z_loss` and :func:`linear_cross_entropy` have the same
        term beside the likelihood.

    Reference:
        Mitchell Wortsman, Peter J. Liu, Lechao Xiao, and others. Small-scale proxies for
        large-scale Transformer training instabilities. 2023. arXiv:2309.14322.
    """
    _check_options(_NAME, coefficient, ignore_index, reduction)
    positions = of_logits(_NAME, input, target, ignore_index)
    return positions.loss(_NAME, (coefficient,), reduction)


@formula(_NAME)
def _z_loss(statistics: Statistics, rows: Rows, coefficient: float) -> Tensor:
    return coefficient * rows.weight * statistics.lse.square()


@_PAPER
class ZLoss(OptionsModule):
    """:func:`z_loss` as a module.

    Example:
        >>> import torch
        >>> from tilework.losses import ZLoss
        >>> ZLoss(coefficient=1.0)(torch.zeros(4, 10))
        tensor(5.3019)
    """

    coefficient: float = 1e-4
    ignore_index: int = -100
    reduction: str = "mean"

    def _check(self) -> None:
        _check_options(_NAME, **self.options())

    def forward(self, input: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the loss; shapes as in :func:`z_loss`."""
        return z_loss(input, target, **self.options())


@_PAPER
def linear_z_loss(
    input: Float[Tensor, "*tokens features"],
    linear_weight: Float[Tensor, "classes features"],
    target: Int64[Tensor, "*tokens"] | None = None,
    *,
    linear_bias: Float[Tensor, " classes"] | None = None,
    coefficient: float = 1e-4,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Float[Tensor, "*tokens"] | None = None,
    shift: int = 0,
    implementation: str | None = None,
    vocab_parallel: VocabShard | None = None,
) -> Float[Tensor, "..."]:
    """:func:`z_loss` of ``F.linear(input, linear_weight, linear_bias)`` without storing it.

    Args:
        input: Hidden states, shape ``(..., D)``, any strides.
        linear_weight: The head's weight, shape ``(V, D)``, of ``input``'s dtype.
        target: Classes, int64 of shape ``(...)``, which say only which positions are
            ignored; None keeps all.
        linear_bias: The head's bias, shape ``(V)``, of ``input``'s dtype.
        coefficient: What the squares are multiplied by, at least 0.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        token_weight: A weight for each position, of ``target``'s shape, any floating dtype; a
            constant.
        shift: With ``k`` above 0, position ``t`` predicts ``target[..., t + k]``; needs sequences,
            ``input`` of shape ``(..., B, T, D)``.
        implementation: As in :func:`linear_cross_entropy`.
        vocab_parallel: The classes that this process holds of a head spread over processes, as in
            :func:`linear_cross_entropy`.

    Returns:
        A scalar, or for ``"none"`` one number for each position with zeros where ignored; float32
        for half-precision input, otherwise of its dtype. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape, option or implementation is not one of those above.
        TypeError: ``target`` is not int64, or the floating dtypes differ outside autocast.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            and gradients are nan.

    Example:
        >>> import torch
        >>> from tilework.losses import linear_z_loss
        >>> linear_z_loss(torch.zeros(4, 8), torch.randn(10, 8), coefficient=1.0)  # log(10)**2
        tensor(5.3019)

    Deviations:
        As :func:`z_loss`. Beside the likelihood, ``z_loss`` of :func:`linear_cross_entropy` is the
        same term at no cost.

    Reference:
        As :func:`z_loss`.
    """
    _check_options(_LINEAR, coefficient, ignore_index, reduction)
    positions = of_head(
        _LINEAR,
        input,
        linear_weight,
        target,
        linear_bias,
        ignore_index,
        implementation,
        token_weight=token_weight,
        shift=shift,
        vocab_parallel=vocab_parallel,
        is_sum=reduction != "none",
    )
    return positions.loss(_NAME, (coefficient,), reduction)


def _check_options(function: str, coefficient: float, ignore_index: int, reduction: str) -> None:
    _checks.at_least(function, "coefficient", coefficient, 0)
    class_index.check_options(function, ignore_index, reduction)
