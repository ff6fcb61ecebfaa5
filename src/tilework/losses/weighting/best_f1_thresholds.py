"""The threshold of each class with the largest F1 score."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements

__all__ = ["F1Thresholds", "best_f1_thresholds"]

_NAME = "best_f1_thresholds"
_PAPER = implements(
    "Multi-Label Sentiment Analysis on 100 Languages with Dynamic Weighting for Label Imbalance",
    year=2020,
    arxiv="2008.11573",
)


@_PAPER
class F1Thresholds(NamedTuple):
    """What :func:`best_f1_thresholds` returns.

    Args:
        threshold: The best threshold of each class, shape ``(C)``.
        f1: The F1 score there, shape ``(C)``.

    Example:
        >>> import torch
        >>> from tilework.losses import best_f1_thresholds
        >>> scores = torch.tensor([[0.9], [0.6], [0.3]])
        >>> best_f1_thresholds(scores, torch.tensor([[True], [True], [False]])).threshold
        tensor([0.6000])

    Reference:
        As :func:`best_f1_thresholds`.
    """

    threshold: Tensor
    f1: Tensor


@_PAPER
def best_f1_thresholds(
    scores: Float[Tensor, "samples classes"],
    target: Bool[Tensor, "samples classes"] | Integer[Tensor, "samples classes"],
) -> F1Thresholds:
    r"""Find for each class the threshold on its scores with the largest F1 score.

    A sample is predicted positive where its score is at least the threshold. With the true
    positives, false positives and false negatives of that prediction against ``target``:

    .. math::

        F_1 = \frac{2 \, TP}{2 \, TP + FP + FN}

    The candidates are the scores themselves; of equal F1 scores the largest threshold wins, so that
    a class without positives gets its largest score and an F1 score of 0. One sort and one sweep.

    Args:
        scores: Shape ``(N, C)``, ``N >= 1``.
        target: Labels 0 or 1, bool or integer, shape ``(N, C)``.

    Returns:
        The thresholds and their F1 scores, each of shape ``(C)`` and the dtype of ``scores``; nan
        for a class with a score of nan.

    Raises:
        ValueError: A shape is not one of those above; on the CPU, a label is neither 0 nor 1.
            Elsewhere the results of its class are nan.
        TypeError: ``scores`` is not of a floating dtype, or ``target`` neither bool nor integer.

    Example:
        >>> import torch
        >>> from tilework.losses import best_f1_thresholds
        >>> scores = torch.tensor([[0.9, 0.2], [0.6, 0.4], [0.3, 0.7], [0.1, 0.5]])
        >>> target = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 0]])
        >>> best_f1_thresholds(scores, target)
        F1Thresholds(threshold=tensor([0.3000, 0.7000]), f1=tensor([0.8000, 0.0000]))

    Reference:
        Selim F. Yilmaz, E. Batuhan Kaynak, Aykut Koç, Hamdi Dibeklioğlu, Suleyman S. Kozat.
        Multi-Label Sentiment Analysis on 100 Languages with Dynamic Weighting for Label Imbalance.
        2020. arXiv:2008.11573.
    """
    _checks.floating(_NAME, "scores", scores)
    if scores.dim() != 2 or scores.shape[0] == 0:
        raise _checks.bad_value(_NAME, "scores", "of shape (N, C), N >= 1", scores)
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
        accepted = f"bool or integer of shape {tuple(scores.shape)}"
        raise _checks.bad_type(_NAME, "target", accepted, target)
    _checks.shape(_NAME, "target", target, scores.shape)
    _checks.same_device(_NAME, scores=scores, target=target)
    labels = (target == 0) | (target == 1)
    if _checks.holds_values(target) and not bool(labels.all()):
        wrong = target[~labels][0].item()
        raise ValueError(f"{_NAME}: target must be 0 or 1 everywhere, got {wrong}")

    scores = scores.detach()
    broken = scores.isnan().any(0) | ~labels.all(0)
    falling, order = scores.sort(0, descending=True)
    positives = target.gather(0, order)
    del labels, order  # of many samples, each is as large as the scores or twice so
    predicted = torch.arange(1, scores.shape[0] + 1, device=scores.device).unsqueeze(1)
    total = positives.sum(0)
    f1 = positives.cumsum(0).double().mul_(2)
    f1 = f1.div_(predicted + total)
    del positives
    # Of equal scores, all are predicted: only the last one counts.
    same_as_next = torch.zeros_like(falling, dtype=torch.bool)
    same_as_next[:-1] = falling[:-1] == falling[1:]
    f1 = f1.masked_fill_(same_as_next, -1)
    best = f1.argmax(0, keepdim=True)  # the first of the largest
    threshold, f1 = (
        values.gather(0, best).squeeze(0).masked_fill(broken, torch.nan).to(scores.dtype)
        for values in (falling, f1)
    )
    return F1Thresholds(threshold, f1)
