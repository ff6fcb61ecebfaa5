"""The error norm of a prediction, and cross-entropy without the positions where it is large."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from tilework import _checks
from tilework._implementations import TABLES
from tilework._options import OptionsModule
from tilework.catalog import implements
from tilework.losses._classes import blocks, class_index, linear, logits
from tilework.losses._classes.cross_entropy import cross_entropy
from tilework.losses._classes.positions import OfHead, OfLogits, Positions, of_head, of_logits
from tilework.losses._classes.sharding import VocabShard
from tilework.losses._classes.statistics import Statistics

__all__ = [
    "ErrorNormTruncationLoss",
    "error_norm",
    "error_norm_truncation_loss",
    "linear_error_norm_truncation_loss",
]

_NORM = "error_norm"
_NAME = "error_norm_truncation_loss"
_LINEAR = "linear_error_norm_truncation_loss"
TABLES |= {f"losses.{_NAME}": logits.IMPLEMENTATIONS, f"losses.{_LINEAR}": linear.IMPLEMENTATIONS}
_PAPER = implements(
    "Error Norm Truncation: Robust Training in the Presence of Data Noise for Text Generation "
    "Models",
    year=2023,
    arxiv="2310.00840",
)


@_PAPER
def error_norm(
    input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."],
    *,
    ignore_index: int = -100,
) -> Float[Tensor, "..."]:
    r"""Distance of the predicted probabilities from the target's, in the Euclidean norm.

    With :math:`p_i` the softmax of the logits of a position of ``input`` and its class :math:`y_i`
    in ``target``:

    .. math::

        e_i = \| p_i - \mathrm{onehot}(y_i) \|_2
            = \Big( \sum_{j \ne y_i} p_{ij}^2 + \big( \sum_{j \ne y_i} p_{ij} \big)^2 \Big)^{1/2}

    It lies in :math:`[0, \sqrt 2)`, and is as exact for confident positions as for others. It has
    no gradient.

    Args:
        input: Logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: Classes, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``.
        ignore_index: Targets of this value have the norm 0.

    Returns:
        The shape of ``target``; of the dtype of ``input``, for half precision under autocast
        float32.

    Raises:
        ValueError: A shape is not one of those above.
        TypeError: ``input`` is not of a floating dtype, ``target`` is not int64, or
            ``ignore_index`` is not an int.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its norm
            is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import error_norm
        >>> error_norm(torch.zeros(3, 2), torch.tensor([0, 1, -100]))
        tensor([0.7071, 0.7071, 0.0000])

    Reference:
        Tianjian Li, Haoran Xu, Philipp Koehn, Daniel Khashabi, Kenton Murray. Error Norm
        Truncation: Robust Training in the Presence of Data Noise for Text Generation Models. 2023.
        arXiv:2310.00840.
    """
    _checks.integer(_NORM, "ignore_index", ignore_index)
    positions = of_logits(_NORM, input, target, ignore_index)
    return positions.reduce(_error_norms(positions), "none")


@_PAPER
def error_norm_truncation_loss(
    input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."],
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    denominator: str = "tokens",
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Float[Tensor, "..."]:
    r"""``F.cross_entropy`` without the positions of the largest :func:`error_norm`.

    With the error norms :math:`e_i`, a position is dropped where :math:`e_i >` ``threshold``; or,
    with :math:`\varphi` = ``fraction`` and :math:`n` kept targets, where :math:`e_i > \theta`, the
    :math:`(\lfloor \varphi n \rfloor + 1)`-th largest of their norms, so that those equal to
    :math:`\theta` survive. Which positions are dropped is a constant for the gradient; theirs is 0.
    To warm up, give neither option until the step from which to truncate.

    Args:
        input: Logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: Classes, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``.
        threshold: The largest norm that survives, at least 0.
        fraction: The largest part of the kept targets to drop, at least 0 and below 1.
        denominator: What ``"mean"`` divides by: ``"tokens"``, the number of kept targets, or
            ``"kept"``, that of the survivors.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: The part of the target, from 0 to 1, that is spread evenly over the
            classes. The norm does not know of it.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target`` with zeros where ignored or dropped; of
        the dtype of ``input``, for half precision under autocast float32. ``"mean"`` over nothing
        is nan.

    Raises:
        ValueError: A shape or option is not one of those above, or both ``threshold`` and
            ``fraction`` are given.
        TypeError: ``input`` is not of a floating dtype, or ``target`` is not int64.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import error_norm_truncation_loss
        >>> input = torch.tensor([[0.0, 0.0], [0.0, 9.0]])
        >>> error_norm_truncation_loss(input, torch.tensor([0, 0]), threshold=1.0)  # log(2) / 2
        tensor(0.3466)

    Deviations:
        The released criterion counts ignored positions in :math:`\varphi n`, and spreads the
        smoothed part over the wrong classes. Here ignored positions are not counted, and smoothing
        is that of ``F.cross_entropy``.

    Reference:
        As :func:`error_norm`.
    """
    _check_options(
        _NAME, threshold, fraction, denominator, ignore_index, reduction, label_smoothing
    )
    positions = of_logits(_NAME, input, target, ignore_index)
    truncates = threshold is not None or fraction is not None
    norms, statistics = None, None
    if truncates and positions.implementation == "reference":
        norms, statistics = _norms_and_statistics(positions, label_smoothing != 0)
    elif truncates:
        norms = _error_norms(positions)
    survives = _survivors(norms, positions.kept, threshold, fraction)
    return _truncated(positions, survives, denominator, reduction, label_smoothing, statistics)


@_PAPER
class ErrorNormTruncationLoss(OptionsModule):
    """:func:`error_norm_truncation_loss` as a module.

    Example:
        >>> import torch
        >>> from tilework.losses import ErrorNormTruncationLoss
        >>> criterion = ErrorNormTruncationLoss(fraction=0.25)
        >>> criterion(torch.tensor([[0.0, 0.0]] * 3 + [[0.0, 9.0]]), torch.tensor([0, 1, 0, 0]))
        tensor(0.5199)
    """

    threshold: float | None = None
    fraction: float | None = None
    denominator: str = "tokens"
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0

    def _check(self) -> None:
        _check_options(_NAME, **self.options())

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss; shapes as in :func:`error_norm_truncation_loss`."""
        return error_norm_truncation_loss(input, target, **self.options())


@_PAPER
def linear_error_norm_truncation_loss(
    input: Float[Tensor, "*tokens features"],
    linear_weight: Float[Tensor, "classes features"],
    target: Int64[Tensor, "*tokens"],
    *,
    linear_bias: Float[Tensor, " classes"] | None = None,
    threshold: float | None = None,
    fraction: float | None = None,
    denominator: str = "tokens",
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    shift: int = 0,
    implementation: str | None = None,
    vocab_parallel: VocabShard | None = None,
) -> Float[Tensor, "..."]:
    r""":func:`error_norm_truncation_loss` of a linear layer's output without storing it.

    The logits are those of ``F.linear(input, linear_weight, linear_bias)``. The norms take two more
    passes over the head, without gradients:

    .. math::

        \| p_i \|_2^2 = e^{\mathrm{lse}(2 z_i) - 2 \, \mathrm{lse}(z_i)}

    Args:
        input: Hidden states, shape ``(..., D)``, any strides.
        linear_weight: The head's weight, shape ``(V, D)``, of ``input``'s dtype.
        target: Classes, int64 of shape ``(...)``.
        linear_bias: The head's bias, shape ``(V)``, of ``input``'s dtype.
        threshold: The largest norm that survives, at least 0.
        fraction: The largest part of the kept targets to drop, at least 0 and below 1.
        denominator: What ``"mean"`` divides by: ``"tokens"`` or ``"kept"``.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: The part of the target, from 0 to 1, that is spread evenly over the
            classes.
        shift: With ``k`` above 0, position ``t`` predicts ``target[..., t + k]``; needs sequences,
            ``input`` of shape ``(..., B, T, D)``.
        implementation: As in :func:`linear_cross_entropy`.
        vocab_parallel: The classes that this process holds of a head spread over processes, as in
            :func:`linear_cross_entropy`.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target`` with zeros where ignored or dropped;
        float32 for half-precision input, otherwise of its dtype. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape, option or implementation is not one of those above, or both
            ``threshold`` and ``fraction`` are given.
        TypeError: ``target`` is not int64, or the floating dtypes differ outside autocast.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            and gradients are nan.

    Example:
        >>> import torch
        >>> from tilework.losses import linear_error_norm_truncation_loss
        >>> hidden, head = torch.tensor([[0.0], [9.0]]), torch.tensor([[0.0], [1.0]])
        >>> linear_error_norm_truncation_loss(hidden, head, torch.tensor([0, 0]), threshold=1.0)
        tensor(0.3466)

    Deviations:
        The squared norms have an absolute error of a few rounding units, where those of
        :func:`error_norm` have a relative one: norms below about 0.001 in float32 are not told
        apart to their last digits.

    Reference:
        As :func:`error_norm`.
    """
    _check_options(
        _LINEAR, threshold, fraction, denominator, ignore_index, reduction, label_smoothing
    )
    positions = of_head(
        _LINEAR,
        input,
        linear_weight,
        target,
        linear_bias,
        ignore_index,
        implementation,
        shift=shift,
        vocab_parallel=vocab_parallel,
        is_sum=reduction != "none",
    )
    if fraction is not None and positions.layout.token_groups:
        raise ValueError(
            f"{_LINEAR}: fraction must be None for tokens that are spread over processes, as it is "
            f"one of all of them, got {fraction!r}"
        )
    truncates = threshold is not None or fraction is not None
    norms = _linear_error_norms(positions.detached()) if truncates else None
    survives = _survivors(norms, positions.kept, threshold, fraction)
    return _truncated(positions, survives, denominator, reduction, label_smoothing)


def _truncated(
    positions: Positions,
    survives: Tensor,
    denominator: str,
    reduction: str,
    label_smoothing: float,
    statistics: Statistics | None = None,
) -> Tensor:
    """The reduced cross-entropy of the survivors."""
    counted = positions.counting(survives)
    if denominator == "kept" or reduction != "mean":
        return cross_entropy(counted, reduction, label_smoothing, statistics=statistics)
    exact = replace(counted, dtype=counted.weight.dtype)
    total = cross_entropy(exact, "sum", label_smoothing, statistics=statistics)
    return (total / positions.total_weight).to(positions.dtype)


def _error_norms(positions: OfLogits) -> Tensor:
    """The error norm of each position, exact for confident ones: 1 - p would lose its digits."""

    def norms(probabilities: Tensor, target: Tensor) -> Tensor:
        known = (target >= 0) & (target < probabilities.shape[1])
        column = target.where(known, 0).unsqueeze(1)
        if blocks.is_eager(probabilities):
            wrong = probabilities.scatter_(1, column, 0)
        else:  # the targets alone may be batched
            wrong = probabilities.scatter(1, column, 0)
        total = wrong.sum(1)
        # Shares of the total, as squares of small probabilities underflow.
        squares = wrong.div_(total.where(total > 0, 1).unsqueeze(1)).square_().sum(1)
        return (total * (1 + squares).sqrt()).where(known, torch.nan)

    return blocks.of_probabilities(norms, positions.input.detach(), positions.target)


def _norms_and_statistics(positions: OfLogits, spreads: bool) -> tuple[Tensor, Statistics]:
    """The error norms, and what the cross-entropy needs, from one exponential of each logit.

    Compilers make as many loops of it as of cross-entropy alone, if the statistics are those of all
    kept positions, survivors or not.
    """
    values = positions.input.to(positions.weight.dtype)
    logits, constant = values.where(positions.kept.unsqueeze(1), 0), values.detach()
    order = torch.arange(positions.classes, device=values.device)
    wrong = order.reshape(-1, *[1] * (values.dim() - 2)) != positions.target.unsqueeze(1)
    # Shifted by the largest wrong one, as squares of small probabilities underflow. It is no -inf,
    # of which the gap to itself is nan.
    shift, peak = constant.amax(1), constant.where(wrong, torch.finfo(values.dtype).min).amax(1)
    exponentials = (logits - peak.unsqueeze(1)).where(wrong, -torch.inf).exp()
    total, squares = exponentials.sum(1), exponentials.detach().square().sum(1)
    statistics = positions.statistics(positions.spread if spreads else None)
    of_wrong = (peak - shift).exp() * total
    of_all = of_wrong + statistics.target_gap.neg().exp()
    share = squares / total.detach().where(total > 0, 1).square()
    norms = of_wrong.detach() / of_all.detach() * (1 + share).sqrt()
    return norms, statistics._replace(total=of_all.where(positions.kept, 1))


def _linear_error_norms(positions: OfHead) -> Tensor:
    """The error norm of each position from sums of exponentials and of their squares."""
    _, total, gap, *_ = positions.statistics()
    _, total_square, gap_square, *_ = positions.statistics(temperature=0.5)
    wrong = total - (-gap).exp()
    squares = (total_square - (-gap_square).exp()).clamp(min=0)  # a kernel may round otherwise
    return (squares + wrong.square()).sqrt() / total


def _survivors(
    norms: Tensor | None, kept: Tensor, threshold: float | None, fraction: float | None
) -> Tensor:
    """Which kept positions are not dropped; one of nan is not."""
    if norms is None:
        return kept
    if threshold is not None:
        return kept & ~(norms > threshold)
    # Ranks are tensors, so that the host need not wait for a count.
    ordered = norms.masked_fill(~kept, -1).flatten().sort(descending=True).values
    rank = (kept.sum().double() * (fraction or 0)).floor().to(torch.int64)
    limit = F.pad(ordered, (0, 1)).gather(0, rank[None]).squeeze(0)
    return kept & ~(norms > limit)


def _check_options(
    function: str,
    threshold: float | None,
    fraction: float | None,
    denominator: str,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> None:
    if threshold is not None and fraction is not None:
        raise ValueError(
            f"{function}: threshold and fraction must not both be given, "
            f"got threshold={threshold!r} and fraction={fraction!r}"
        )
    if threshold is not None:
        _checks.at_least(function, "threshold", threshold, 0)
    if fraction is not None and not 0 <= _checks.number(function, "fraction", fraction) < 1:
        accepted = "a number of at least 0 and below 1"
        raise _checks.bad_value(function, "fraction", accepted, fraction)
    _checks.one_of(function, "denominator", denominator, ("tokens", "kept"))
    class_index.check_options(function, ignore_index, reduction)
    _checks.fraction(function, "label_smoothing", label_smoothing)
