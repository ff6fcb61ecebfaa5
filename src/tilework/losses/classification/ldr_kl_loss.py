"""Label-distributionally robust losses, with one temperature and with one for each position."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tilework import _checks
from tilework._implementations import TABLES
from tilework._options import OptionsModule
from tilework.catalog import implements
from tilework.losses._classes import class_index
from tilework.losses._classes.class_index import Positions
from tilework.losses._classes.linear import IMPLEMENTATIONS
from tilework.losses._classes.positions import of_head
from tilework.losses._classes.sharding import VocabShard

__all__ = ["ALDRKLLoss", "LDRKLLoss", "aldr_kl_loss", "ldr_kl_loss", "linear_ldr_kl_loss"]

_NAME = "ldr_kl_loss"
_ADAPTIVE = "aldr_kl_loss"
_LINEAR = "linear_ldr_kl_loss"
TABLES[f"losses.{_LINEAR}"] = IMPLEMENTATIONS
_LIMITS = 1e-30, 1e30  # temperatures that are 0 and infinite to rounding, but divide
_PAPER = implements(
    "Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness "
    "and Adaptivity",
    year=2021,
    arxiv="2112.14869",
)


@_PAPER
def ldr_kl_loss(
    input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."],
    *,
    temperature: float = 1.0,
    margin: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Margin of the wrong classes, averaged over the worst distribution near the uniform one.

    With the logits :math:`z_i` of a position of ``input``, its class :math:`y_i` in ``target``,
    :math:`C` classes, :math:`\lambda` = ``temperature`` and :math:`\mu` = ``margin``:

    .. math::

        \delta_{ik} &= z_{ik} - z_{i y_i} + \mu [k \ne y_i] \\
        \ell_i &= \max_p \sum_k p_k \delta_{ik} - \lambda \, \mathrm{KL}(p \,\|\, 1 / C)
            = \lambda \Big( \log \sum_k e^{\delta_{ik} / \lambda} - \log C \Big)

    with the gradient :math:`\mathrm{softmax}(\delta_i / \lambda)` with respect to :math:`\delta_i`.
    It decreases in :math:`\lambda` from the largest :math:`\delta_{ik}` to their mean; at 1 and
    without margin it is cross-entropy less :math:`\log C`. ``"mean"`` is the mean over the kept
    positions.

    Args:
        input: Logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: Classes, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``.
        temperature: At least 0, which gives the largest :math:`\delta_{ik}`, or infinite, which
            gives their mean.
        margin: What is added to the logits of the wrong classes, at least 0.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target`` with zeros where ignored; of the dtype
        of ``input``, for half precision under autocast float32. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``input`` is not of a floating dtype, or ``target`` is not int64.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            is nan.

    Example:
        >>> import math, torch
        >>> from tilework.losses import ldr_kl_loss
        >>> input, target = torch.tensor([[0.0, 3.0, -6.0]]), torch.tensor([0])
        >>> [ldr_kl_loss(input, target, temperature=t).item() for t in (0.0, math.inf)]
        [3.0, -1.0]

    Deviations:
        The authors' trainer scales the logits to an L1 norm of :math:`C` and leaves
        :math:`\log C` out. Here the logits are used as they are, and the constant stays. Where
        several :math:`\delta_{ik}` are the largest at a temperature of 0, they share the gradient
        evenly, which is its limit.

    Reference:
        Dixian Zhu, Yiming Ying, Tianbao Yang. Label Distributionally Robust Losses for Multi-class
        Classification: Consistency, Robustness and Adaptivity. 2021. arXiv:2112.14869.
    """
    _check_options(temperature, margin, ignore_index, reduction)
    positions = class_index.positions(_NAME, input, target, ignore_index)
    losses = _soft_maximum(_gaps(positions, margin), _finite(temperature), positions.dim)
    return positions.reduce(losses, reduction)


@_PAPER
class LDRKLLoss(OptionsModule):
    """:func:`ldr_kl_loss` as a module.

    Example:
        >>> import torch
        >>> from tilework.losses import LDRKLLoss
        >>> criterion = LDRKLLoss(temperature=0.0, margin=0.5)
        >>> criterion(torch.zeros(4, 10), torch.tensor([1, 2, 3, 4]))
        tensor(0.5000)
    """

    temperature: float = 1.0
    margin: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"

    def _check(self) -> None:
        _check_options(**self.options())

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss; shapes as in :func:`ldr_kl_loss`."""
        return ldr_kl_loss(input, target, **self.options())


@_PAPER
def linear_ldr_kl_loss(
    input: Float[Tensor, "*tokens features"],
    linear_weight: Float[Tensor, "classes features"],
    target: Int64[Tensor, "*tokens"],
    *,
    linear_bias: Float[Tensor, " classes"] | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Float[Tensor, "*tokens"] | None = None,
    shift: int = 0,
    implementation: str | None = None,
    vocab_parallel: VocabShard | None = None,
) -> Float[Tensor, "..."]:
    r""":func:`ldr_kl_loss` of ``F.linear(input, linear_weight, linear_bias)`` without storing it.

    Args:
        input: Hidden states, shape ``(..., D)``, any strides.
        linear_weight: The head's weight, shape ``(V, D)``, of ``input``'s dtype.
        target: Classes, int64 of shape ``(...)``.
        linear_bias: The head's bias, shape ``(V)``, of ``input``'s dtype.
        temperature: Above 0 and finite; the logits divided by it must be finite too.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        token_weight: A weight for each position, of ``target``'s shape, any floating dtype; a
            constant.
        shift: With ``k`` above 0, position ``t`` predicts ``target[..., t + k]``; needs sequences,
            ``input`` of shape ``(..., B, T, D)``.
        implementation: As in :func:`linear_log_probs`.
        vocab_parallel: The classes that this process holds of a head spread over processes, as in
            :func:`linear_cross_entropy`.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target`` with zeros where ignored; float32 for
        half-precision input, otherwise of its dtype. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape, option or implementation is not one of those above.
        TypeError: ``target`` is not int64, or the floating dtypes differ outside autocast.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            and gradients are nan.

    Example:
        >>> import torch
        >>> from tilework.losses import linear_ldr_kl_loss
        >>> hidden, head = torch.tensor([[1.0]]), torch.tensor([[0.0], [3.0], [-6.0]])
        >>> linear_ldr_kl_loss(hidden, head, torch.tensor([0]), temperature=0.1)  # below 3
        tensor(2.8901)

    Deviations:
        There is no ``margin``: with one, the loss of a confident position is
        :math:`\lambda \log (p + e^{\mu / \lambda} (1 - p))` less a constant, which multiplies the
        rounding error of the probability :math:`p` by :math:`e^{\mu / \lambda}`. The limits of the
        temperature are not offered, and the rounding error is one of :math:`\lambda`, where that
        of :func:`ldr_kl_loss` is one of the logits.

    Reference:
        As :func:`ldr_kl_loss`.
    """
    _checks.positive(_LINEAR, "temperature", temperature)
    class_index.check_options(_LINEAR, ignore_index, reduction)
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
        is_sum=False,
    )
    statistics = positions.statistics(temperature=temperature)
    # log(total / C), not log(total) - log(C), keeps the error below that of log(C).
    log_mean = (statistics.total / positions.classes).log()
    losses = positions.weight * temperature * (statistics.target_gap + log_mean)
    return positions.reduce(losses, reduction)


@_PAPER
def aldr_kl_loss(
    input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."],
    *,
    temperature: float = 1.0,
    alpha: float = 2.0,
    margin: float = 0.0,
    num_steps: int = 10,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r""":func:`ldr_kl_loss` with a temperature for each position, small where it is certain.

    With :math:`\delta_i` of :func:`ldr_kl_loss`, :math:`C` classes, :math:`\lambda_0` =
    ``temperature`` and :math:`\alpha` = ``alpha``:

    .. math::

        \ell_i = \max_{\lambda, p} \sum_k p_k \delta_{ik} - \lambda \, \mathrm{KL}(p \,\|\, 1 / C)
            - \frac{\alpha \log C}{2 \lambda_0} (\lambda - \lambda_0)^2

    From :math:`\lambda = \lambda_0` on, ``num_steps`` times,

    .. math::

        \lambda \leftarrow \lambda_0 \Big( 1 - \frac{\mathrm{KL}(\mathrm{softmax}(\delta_i /
            \lambda) \,\|\, 1 / C)}{\alpha \log C} \Big)

    The iterates fall to the largest temperature that they leave alone, and stay in
    :math:`[\lambda_0 (1 - 1 / \alpha), \lambda_0]`. The last one is a constant for the gradient,
    which is that of the maximum where they have converged. ``"mean"`` is the mean over the kept
    positions.

    Args:
        input: Logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``, ``C >= 2``.
        target: Classes, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``.
        temperature: The largest temperature, above 0.
        alpha: How closely temperatures are held to the largest one, above 1.
        margin: What is added to the logits of the wrong classes, at least 0.
        num_steps: How many times the temperatures are improved, at least 0.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target`` with zeros where ignored; of the dtype
        of ``input``, for half precision under autocast float32. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``input`` is not of a floating dtype, ``target`` is not int64, or ``num_steps``
            is not an int.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import aldr_kl_loss, ldr_kl_loss
        >>> input, target = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([0])
        >>> [round(loss(input, target).item(), 3) for loss in (ldr_kl_loss, aldr_kl_loss)]
        [-1.098, -0.824]

    Deviations:
        The maximum is over the temperature too, as in the authors' trainer: a minimum would give
        temperatures above ``temperature``. The trainer keeps a temperature for each example and
        improves it once in an epoch; here it is improved within the call. Second derivatives take
        the temperatures for constants too.

    Reference:
        As :func:`ldr_kl_loss`.
    """
    _check_adaptive_options(temperature, alpha, margin, num_steps, ignore_index, reduction)
    positions = class_index.positions(_ADAPTIVE, input, target, ignore_index, min_classes=2)
    dim, temperature = positions.dim, _finite(temperature)
    gaps = _gaps(positions, margin)
    log_classes = gaps.new_full((), input.shape[dim]).log()
    constant = gaps.detach()
    divergence = torch.zeros_like(constant.sum(dim))
    share = torch.ones_like(divergence)  # a temperature's of the largest one
    for _ in range(num_steps):
        scaled = constant / (temperature * share).unsqueeze(dim)
        entropy = torch.special.entr(scaled.softmax(dim)).sum(dim)
        divergence = log_classes - entropy
        share = (1 - divergence / (alpha * log_classes)).clamp(min=1 - 1 / alpha)
    penalty = temperature / 2 * divergence * (1 - share)
    losses = _soft_maximum(gaps, temperature * share, dim) - penalty
    return positions.reduce(losses, reduction)


@_PAPER
class ALDRKLLoss(OptionsModule):
    """:func:`aldr_kl_loss` as a module.

    Example:
        >>> import torch
        >>> from tilework.losses import ALDRKLLoss
        >>> criterion = ALDRKLLoss(alpha=4.0)
        >>> criterion(torch.zeros(4, 10), torch.tensor([1, 2, 3, 4]))
        tensor(0.)
    """

    temperature: float = 1.0
    alpha: float = 2.0
    margin: float = 0.0
    num_steps: int = 10
    ignore_index: int = -100
    reduction: str = "mean"

    def _check(self) -> None:
        _check_adaptive_options(**self.options())

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss; shapes as in :func:`aldr_kl_loss`."""
        return aldr_kl_loss(input, target, **self.options())


def _gaps(positions: Positions, margin: float) -> Tensor:
    """What each class's logit, plus the margin if it is wrong, is above the target's."""
    gaps = positions.logits - positions.at_target(positions.logits).unsqueeze(positions.dim)
    margins = torch.full_like(gaps, margin)
    return gaps + margins.scatter(positions.dim, positions.target.unsqueeze(positions.dim), 0)


def _finite(temperature: float) -> float:
    """A temperature of the same loss that divides in every dtype."""
    smallest, largest = _LIMITS
    return min(max(temperature, smallest), largest)


def _soft_maximum(gaps: Tensor, temperature: Tensor | float, dim: int) -> Tensor:
    """``temperature * log(mean(exp(gaps / temperature)))`` over a dimension."""
    if isinstance(temperature, Tensor):
        wide = temperature.unsqueeze(dim)
    else:
        wide = gaps.new_tensor(temperature)
    top = gaps.detach().amax(dim, keepdim=True)
    scaled = (gaps - top) / wide
    mean = scaled.exp().mean(dim)
    # Near 1, where a large temperature would multiply its rounding error, without the 1.
    near = scaled.expm1().mean(dim).clamp(min=-0.5).log1p()
    return top.squeeze(dim) + temperature * torch.where(mean > 0.5, near, mean.log())


def _check_options(temperature: float, margin: float, ignore_index: int, reduction: str) -> None:
    if not _checks.number(_NAME, "temperature", temperature) >= 0:
        raise _checks.bad_value(_NAME, "temperature", "a number of at least 0", temperature)
    _checks.at_least(_NAME, "margin", margin, 0)
    class_index.check_options(_NAME, ignore_index, reduction)


def _check_adaptive_options(
    temperature: float,
    alpha: float,
    margin: float,
    num_steps: int,
    ignore_index: int,
    reduction: str,
) -> None:
    _checks.positive(_ADAPTIVE, "temperature", temperature)
    if not 1 < _checks.number(_ADAPTIVE, "alpha", alpha) < math.inf:
        raise _checks.bad_value(_ADAPTIVE, "alpha", "a finite number above 1", alpha)
    _checks.at_least(_ADAPTIVE, "margin", margin, 0)
    _checks.count(_ADAPTIVE, "num_steps", num_steps, 0)
    class_index.check_options(_ADAPTIVE, ignore_index, reduction)
