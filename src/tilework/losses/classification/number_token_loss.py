"""Losses that see how far apart the numbers are that tokens stand for."""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tilework import _checks
from tilework._implementations import TABLES
from tilework._operators import computation_dtype
from tilework._options import StatefulModule, buffer, state
from tilework.catalog import implements
from tilework.losses._classes import class_index, logits
from tilework.losses._classes.cross_entropy import cross_entropy
from tilework.losses._classes.positions import OfLogits, of_logits

__all__ = [
    "NumberTokenCrossEntropyLoss",
    "NumberTokenLoss",
    "number_token_cross_entropy",
    "number_token_loss",
]

TABLES["losses.number_token_cross_entropy"] = logits.IMPLEMENTATIONS
_KINDS = ("wasserstein", "mse")
_PAPER = implements(
    "Regress, Don't Guess: A Regression-like Loss on Number Tokens for Language Models",
    year=2024,
    arxiv="2411.02083",
)


@_PAPER
def number_token_loss(
    input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."],
    token_values: Float[Tensor, " classes"],
    *,
    kind: str = "wasserstein",
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Distance between the predicted distribution of numbers and the true number.

    With the tokens :math:`M` that have a value :math:`v_m` in ``token_values``, the softmax
    :math:`q_i` over their logits alone in ``input``, and the value :math:`v_{y_i}` of the target:

    .. math::

        \ell_i = \sum_{m \in M} q_{im} \, |v_m - v_{y_i}| \quad (\text{"wasserstein"}), \qquad
        \ell_i = \Big( \sum_{m \in M} q_{im} v_m - v_{y_i} \Big)^2 \quad (\text{"mse"})

    The first is the Wasserstein-1 distance to the true number; the second is also 0 where wrong
    numbers have the true one as their mean. Positions count whose target is a number: ``"mean"`` is
    over these, and 0 if there are none. Other tokens' logits are not read.

    Args:
        input: Logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: Tokens, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``.
        token_values: The number that each token stands for, nan for other tokens, shape ``(C)``; a
            constant.
        kind: ``"wasserstein"`` or ``"mse"``.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target`` with zeros where no number is expected;
        of the dtype of ``input``, for half precision under autocast float32.

    Raises:
        ValueError: A shape or option is not one of those above, ``token_values`` requires a
            gradient, or on the CPU has an infinity or no number.
        TypeError: ``input`` or ``token_values`` is not of a floating dtype, or ``target`` is not
            int64.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import number_token_loss
        >>> token_values = torch.tensor([torch.nan, 4.0, 5.0, 6.0])  # the first is no number
        >>> input = torch.tensor([[3.0, 0.0, -torch.inf, 0.0]])  # half 4, half 6
        >>> number_token_loss(input, torch.tensor([2]), token_values)
        tensor(1.)
        >>> number_token_loss(input, torch.tensor([2]), token_values, kind="mse")
        tensor(0.)

    Deviations:
        The released code averages an empty selection to nan; and one of its forms measures
        distances in ranks of tokens, not in their values.

    Reference:
        Jonas Zausinger, Lars Pennig, Anamarija Kozina, and others. Regress, Don't Guess: A
        Regression-like Loss on Number Tokens for Language Models. 2024. arXiv:2411.02083.
    """
    name = "number_token_loss"
    _check_options(name, kind, ignore_index, reduction)
    loss = _distance(name, input, target, token_values, None, kind, ignore_index, reduction)
    return loss.to(class_index.result_dtype(input))


@_PAPER
def number_token_cross_entropy(
    input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."],
    token_values: Float[Tensor, " classes"],
    *,
    ntl_weight: float = 0.3,
    kind: str = "wasserstein",
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Float[Tensor, "..."]:
    r"""``F.cross_entropy`` plus the number token loss.

    With the smoothed cross-entropy :math:`\mathrm{CE}` of ``F.cross_entropy``, :math:`\mathrm{NTL}`
    the :func:`number_token_loss` and :math:`\lambda` = ``ntl_weight``:

    .. math::

        \ell = \mathrm{CE} + \lambda \, \mathrm{NTL}

    For ``"mean"`` each part is the mean over its own positions: all that are kept, and those whose
    target is a number.

    Args:
        input: Logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: Tokens, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``.
        token_values: The number that each token stands for, nan for other tokens, shape ``(C)``; a
            constant.
        ntl_weight: The weight of the number token loss, at least 0.
        kind: ``"wasserstein"`` or ``"mse"``.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: The part of the cross-entropy's target, from 0 to 1, that is spread evenly
            over the classes.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target`` with zeros where ignored; of the dtype
        of ``input``, for half precision under autocast float32. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape or option is not one of those above, ``token_values`` requires a
            gradient, or on the CPU has an infinity or no number.
        TypeError: ``input`` or ``token_values`` is not of a floating dtype, or ``target`` is not
            int64.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import number_token_cross_entropy
        >>> token_values = torch.tensor([torch.nan, 4.0, 5.0, 6.0])
        >>> target = torch.tensor([2, 0])  # a number and a word
        >>> number_token_cross_entropy(torch.zeros(2, 4), target, token_values)
        tensor(1.5863)

    Deviations:
        As :func:`number_token_loss`.

    Reference:
        As :func:`number_token_loss`.
    """
    name = "number_token_cross_entropy"
    _check_options(name, kind, ignore_index, reduction)
    _check_more_options(ntl_weight, label_smoothing)
    return _cross_entropy(
        input,
        target,
        token_values,
        None,
        ntl_weight,
        kind,
        ignore_index,
        reduction,
        label_smoothing,
    )


class _NumberTokens(StatefulModule):
    """The buffers of the modules: the values, and the index of the tokens that have one."""

    token_values: Tensor = buffer(kw_only=False, exact=True)
    numbers: Tensor | None = state(lambda self: _numbers(self.token_values), persistent=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.token_values = self.token_values.detach()


@_PAPER
class NumberTokenLoss(_NumberTokens):
    """:func:`number_token_loss` as a module.

    It selects the logits of numbers by an index that it makes once. On a GPU that is faster than
    the function, which cannot know their number without a synchronization and masks the others.
    The buffer ``token_values`` keeps its dtype where the module is cast to a narrower one.

    Example:
        >>> import torch
        >>> from tilework.losses import NumberTokenLoss
        >>> criterion = NumberTokenLoss(torch.tensor([torch.nan, 4.0, 5.0, 6.0]))
        >>> criterion(torch.zeros(1, 4), torch.tensor([2]))
        tensor(0.6667)
    """

    kind: str = "wasserstein"
    ignore_index: int = -100
    reduction: str = "mean"

    def _check(self) -> None:
        _check_token_values("number_token_loss", self.token_values)
        _check_options("number_token_loss", **self.options())

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss; shapes as in :func:`number_token_loss`."""
        loss = _distance(
            "number_token_loss",
            input,
            target,
            self.token_values,
            self.numbers,
            **self.options(),
        )
        return loss.to(class_index.result_dtype(input))


@_PAPER
class NumberTokenCrossEntropyLoss(_NumberTokens):
    """:func:`number_token_cross_entropy` as a module, with the index of :class:`NumberTokenLoss`.

    Example:
        >>> import torch
        >>> from tilework.losses import NumberTokenCrossEntropyLoss
        >>> criterion = NumberTokenCrossEntropyLoss(torch.tensor([torch.nan, 4.0, 5.0, 6.0]))
        >>> criterion(torch.zeros(2, 4), torch.tensor([2, 0]))
        tensor(1.5863)
    """

    ntl_weight: float = 0.3
    kind: str = "wasserstein"
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0

    def _check(self) -> None:
        name = "number_token_cross_entropy"
        _check_token_values(name, self.token_values)
        _check_options(name, self.kind, self.ignore_index, self.reduction)
        _check_more_options(self.ntl_weight, self.label_smoothing)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss; shapes as in :func:`number_token_cross_entropy`."""
        return _cross_entropy(input, target, self.token_values, self.numbers, **self.options())


def _check_options(function: str, kind: str, ignore_index: int, reduction: str) -> None:
    _checks.one_of(function, "kind", kind, _KINDS)
    class_index.check_options(function, ignore_index, reduction)


def _check_more_options(ntl_weight: float, label_smoothing: float) -> None:
    _checks.at_least("number_token_cross_entropy", "ntl_weight", ntl_weight, 0)
    _checks.fraction("number_token_cross_entropy", "label_smoothing", label_smoothing)


def _check_token_values(function: str, token_values: Tensor) -> None:
    """Refuse what is not one number or nan for each class; this reads values."""
    _checks.floating(function, "token_values", token_values)
    if token_values.dim() != 1:
        raise _checks.bad_value(function, "token_values", "of shape (classes,)", token_values)
    _check_values(function, token_values.detach())


def _check_values(function: str, token_values: Tensor) -> None:
    """Refuse an infinity or no number at all; this reads values, if there are some."""
    if token_values.is_meta:
        return
    if bool(token_values.isinf().any()) or bool(token_values.isnan().all()):
        raise ValueError(
            f"{function}: token_values must be finite or nan, with a finite one at least"
        )


def _numbers(token_values: Tensor) -> Tensor | None:
    """The index of the tokens with a value, whose length depends on values; None without these."""
    if token_values.is_meta:
        return None
    return token_values.isnan().logical_not().nonzero()[:, 0]


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    token_values: Tensor,
    numbers: Tensor | None,
    ntl_weight: float,
    kind: str,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    name = "number_token_cross_entropy"
    positions = of_logits(name, input, target, ignore_index)
    exact = replace(positions, dtype=positions.weight.dtype)
    numbers = _check_and_find(name, input, target, token_values, numbers)
    if numbers is None and positions.implementation == "reference":
        truth = _truth(name, exact.input, exact.target, token_values, None, ignore_index)
        likelihood, distances = _both(exact, truth, kind, reduction, label_smoothing)
        distances = exact.restored(distances)
    else:
        truth = _truth(name, input, target, token_values, numbers, ignore_index)
        likelihood = cross_entropy(exact, reduction, label_smoothing)
        distances = _distances(input, truth, numbers, kind)
    return (likelihood + ntl_weight * truth.reduce(distances, reduction)).to(positions.dtype)


def _distance(
    function: str,
    input: Tensor,
    target: Tensor,
    token_values: Tensor,
    numbers: Tensor | None,
    kind: str,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The reduced number token loss, before its rounding to half precision."""
    class_index.check_input(function, "input", input)
    dim = class_index.class_dim(input)
    class_index.check_target(
        function, "target", target, (*input.shape[:dim], *input.shape[dim + 1 :])
    )
    numbers = _check_and_find(function, input, target, token_values, numbers)
    truth = _truth(function, input, target, token_values, numbers, ignore_index)
    return truth.reduce(_distances(input, truth, numbers, kind), reduction)


def _check_and_find(
    function: str, input: Tensor, target: Tensor, token_values: Tensor, numbers: Tensor | None
) -> Tensor | None:
    """The index of tokens with a value; None where to find it would take a synchronization."""
    classes = input.shape[class_index.class_dim(input)]
    _checks.constant(function, "token_values", token_values, (classes,))
    _checks.same_device(function, input=input, target=target, token_values=token_values)
    if numbers is None and _checks.holds_values(token_values):
        _check_values(function, token_values)
        numbers = _numbers(token_values)
    return numbers


class _Truth(NamedTuple):
    """What positions should predict."""

    values: Tensor
    """Of all classes, in the dtype of the computation, of a shape that broadcasts to the logits."""
    value: Tensor
    """The target's, 0 where it is no number."""
    counts: Tensor
    """Where it is one."""
    wrong: Tensor
    """Where the target is no class."""

    def gaps(self, values: Tensor, kind: str, dim: int) -> Tensor:
        """From the true value to others; the mean of large ones close together would cancel."""
        gaps = values - self.value.unsqueeze(dim)
        return gaps.abs() if kind == "wasserstein" else gaps

    def losses(self, means: Tensor, kind: str) -> Tensor:
        """From the mean gaps, 0 where the target is no number."""
        losses = means if kind == "wasserstein" else means.square()
        return losses.where(self.counts, 0).masked_fill(self.wrong, torch.nan)

    def reduce(self, losses: Tensor, reduction: str) -> Tensor:
        """A mean is over the positions that count."""
        if reduction == "sum":
            return losses.sum()
        return losses.sum() / self.counts.sum().clamp(min=1) if reduction == "mean" else losses


def _truth(
    function: str,
    input: Tensor,
    target: Tensor,
    token_values: Tensor,
    numbers: Tensor | None,
    ignore_index: int,
) -> _Truth:
    dim = class_index.class_dim(input)
    kept = class_index.is_kept(target, ignore_index)
    known = kept & class_index.inside(function, target, ignore_index, input.shape[dim])
    values = token_values.to(computation_dtype(input.dtype))
    across = values.reshape(-1, *[1] * (input.dim() - dim - 1))
    if numbers is None and torch.compiler.is_compiling():
        # A gather for every position, made before the loops over classes, would split these.
        order = torch.arange(values.shape[0], device=values.device).reshape(across.shape)
        value = across.where(order == target.unsqueeze(dim), -torch.inf).amax(dim)
    else:
        value = values[target.where(known, 0)]
    counts = known & ~value.isnan()
    return _Truth(across, value.where(counts, 0), counts, kept & ~known)


def _distances(input: Tensor, truth: _Truth, numbers: Tensor | None, kind: str) -> Tensor:
    """The number token loss of each position.

    Where the index of the numbers is not known, other tokens get the probability 0 instead.
    """
    dim = class_index.class_dim(input)
    values, logits = truth.values, input
    if numbers is not None:
        values, logits = values.index_select(0, numbers), input.index_select(dim, numbers)
    logits = logits.to(values.dtype).where(truth.counts.unsqueeze(dim), 0)
    if numbers is None:
        others = values.isnan()
        values = values.where(~others, 0)
        logits = logits.masked_fill(others, -torch.inf)
    means = (logits.softmax(dim) * truth.gaps(values, kind, dim)).sum(dim)
    return truth.losses(means, kind)


def _both(
    positions: OfLogits, truth: _Truth, kind: str, reduction: str, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """The reduced cross-entropy, and the distances, from one exponential of each logit.

    Each logit is shifted by the largest one of its kind, numbers or others, so that compilers make
    of both losses as many loops as of cross-entropy alone.
    """
    values = positions.input.to(positions.dtype)
    logits = values.where(positions.kept.unsqueeze(1), 0)
    is_number = truth.values.abs() >= 0  # inductor has no vectors of isnan
    # No -inf, of which the gap to itself is nan.
    least = torch.finfo(values.dtype).min
    shift, peak = values.detach().amax(1), values.detach().where(is_number, least).amax(1)
    exponentials = (logits - torch.where(is_number, peak.unsqueeze(1), shift.unsqueeze(1))).exp()
    of_numbers = exponentials.where(is_number, 0)
    gaps = truth.gaps(truth.values.where(is_number, 0), kind, 1)
    total, weighted = of_numbers.sum(1), (of_numbers * gaps).sum(1)
    all_total = exponentials.where(~is_number, 0).sum(1) + (peak - shift).exp() * total
    statistics = positions.statistics(positions.spread if label_smoothing else None)
    statistics = statistics._replace(total=all_total.where(positions.kept, 1))
    likelihood = cross_entropy(positions, reduction, label_smoothing, statistics=statistics)
    return likelihood, truth.losses(weighted / total.where(truth.counts, 1), kind)
