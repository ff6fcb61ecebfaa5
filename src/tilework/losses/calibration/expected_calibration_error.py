"""How far confidence is from accuracy, in bins of equal width or equal mass."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements
from tilework.losses._classes import class_index

__all__ = ["ReliabilityDiagram", "expected_calibration_error"]

BINNINGS = ("uniform", "equal_mass")
NORMS = ("l1", "l2", "max")
_NAME = "expected_calibration_error"
_DIAGRAM = "ReliabilityDiagram"
_PAPER = implements("On Calibration of Modern Neural Networks", year=2017, arxiv="1706.04599")


@_PAPER
def expected_calibration_error(
    input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."],
    *,
    num_bins: int = 15,
    norm: str = "l1",
    binning: str = "uniform",
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    r"""Distance between the confidence in the top class and its accuracy, over bins.

    The confidence of a position is the largest of its probabilities, the softmax of the logits in
    ``input``; it is right where that class is the ``target``. With the :math:`n_b` of :math:`N`
    positions in a bin, their mean confidence and their accuracy:

    .. math::

        \mathrm{gap}_b = |\mathrm{accuracy}_b - \mathrm{confidence}_b|, \qquad
        \sum_b \frac{n_b}{N} \mathrm{gap}_b, \quad
        \Big( \sum_b \frac{n_b}{N} \mathrm{gap}_b^2 \Big)^{1/2} \text{ or }
        \max_b \mathrm{gap}_b

    for the norms ``"l1"``, ``"l2"`` and ``"max"``. No gradient is recorded.

    Args:
        input: Logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: Classes, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``.
        num_bins: The number of bins.
        norm: ``"l1"``, ``"l2"`` or ``"max"``.
        binning: ``"uniform"``, bins of equal width; or ``"equal_mass"``, bins of as many positions
            each as equal confidences, which share a bin, allow.
        ignore_index: Targets of this value do not count.

    Returns:
        A scalar, float64 for float64 input, otherwise float32; nan where nothing is kept.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``input`` is not of a floating dtype, or ``target`` is not int64.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere the
            result is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import expected_calibration_error
        >>> input = torch.tensor([[2.0, 0.0], [2.0, 0.0]])  # a confidence of 0.88
        >>> expected_calibration_error(input, torch.tensor([0, 1]))
        tensor(0.3808)

    Deviations:
        A bin holds its lower end, and the last one also 1; in the paper it holds its upper end.
        Bins of equal mass and the norms besides ``"l1"`` and ``"max"`` are later work's.

    Reference:
        Chuan Guo, Geoff Pleiss, Yu Sun, Kilian Q. Weinberger. On Calibration of Modern Neural
        Networks. 2017. arXiv:1706.04599.
    """
    _checks.one_of(_NAME, "norm", norm, NORMS)
    confidence, correct, kept = _top_class(_NAME, input, target, ignore_index)
    return _diagram(_NAME, confidence, correct, kept, num_bins, binning).calibration_error(norm)


@_PAPER
class ReliabilityDiagram(NamedTuple):
    """Confidence and accuracy by bins: how well probabilities are calibrated.

    Made by ``from_logits`` and ``from_confidence``; ``plot`` draws it.

    Args:
        confidence: Mean confidence of each bin, shape ``(B)``, nan for an empty one.
        accuracy: The part of each bin that is right, shape ``(B)``, nan for an empty one.
        count: The size of each bin, int64 of shape ``(B)``.
        edges: The ends of the bins, shape ``(B + 1)``, from 0 to 1.

    Raises:
        ValueError: A shape or option is not one of those of :func:`expected_calibration_error`; on
            the CPU, a confidence is not from 0 to 1. Elsewhere its bin is nan.
        TypeError: A tensor is of a wrong dtype.
        IndexError: As :func:`expected_calibration_error`.
        ImportError: For ``plot``, matplotlib is not installed.

    Example:
        >>> import torch
        >>> from tilework.losses import ReliabilityDiagram
        >>> confidence = torch.tensor([0.1, 0.3, 0.8, 0.6])
        >>> correct = torch.tensor([False, True, True, True])
        >>> diagram = ReliabilityDiagram.from_confidence(confidence, correct, num_bins=2)
        >>> diagram.confidence, diagram.accuracy
        (tensor([0.2000, 0.7000]), tensor([0.5000, 1.0000]))
        >>> diagram.calibration_error()
        tensor(0.3000)

    Reference:
        As :func:`expected_calibration_error`.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor  # type: ignore[assignment]
    edges: Tensor

    @classmethod
    def from_logits(
        cls,
        input: Float[Tensor, "..."],
        target: Int64[Tensor, "..."],
        *,
        num_bins: int = 15,
        binning: str = "uniform",
        ignore_index: int = -100,
    ) -> "ReliabilityDiagram":
        """That of the top class; arguments as in :func:`expected_calibration_error`."""
        name = f"{_DIAGRAM}.from_logits"
        confidence, correct, kept = _top_class(name, input, target, ignore_index)
        return _diagram(name, confidence, correct, kept, num_bins, binning)

    @classmethod
    def from_confidence(
        cls,
        confidence: Float[Tensor, " positions"],
        correct: Bool[Tensor, " positions"],
        *,
        num_bins: int = 15,
        binning: str = "uniform",
    ) -> "ReliabilityDiagram":
        """That of probabilities of events, shape ``(N)``, of which ``correct`` happened."""
        name = f"{_DIAGRAM}.from_confidence"
        _checks.floating(name, "confidence", confidence)
        if confidence.dim() != 1:
            raise _checks.bad_value(name, "confidence", "of shape (N)", confidence)
        if not isinstance(correct, Tensor) or correct.dtype != torch.bool:
            accepted = f"bool of shape {tuple(confidence.shape)}"
            raise _checks.bad_type(name, "correct", accepted, correct)
        _checks.shape(name, "correct", correct, confidence.shape)
        _checks.same_device(name, confidence=confidence, correct=correct)
        confidence = _checks.fractions(name, "confidence", confidence.detach())
        confidence = confidence.to(computation_dtype(confidence.dtype))
        return _diagram(name, confidence, correct, torch.ones_like(correct), num_bins, binning)

    def calibration_error(self, norm: str = "l1") -> Tensor:
        """The distance that :func:`expected_calibration_error` names."""
        _checks.one_of(f"{_DIAGRAM}.calibration_error", "norm", norm, NORMS)
        gaps = (self.accuracy - self.confidence).abs().where(self.count > 0, 0)
        total = self.count.sum()
        if norm == "max":
            return gaps.amax().where(total > 0, torch.nan)
        shares = self.count.to(gaps.dtype) / total
        return (shares * gaps).sum() if norm == "l1" else (shares * gaps.square()).sum().sqrt()

    def plot(self, *, ax: Any = None) -> Any:
        """Draw accuracy over confidence with matplotlib, on ``ax`` or new axes; returns the Axes.

        The part of the positions in each bin stands beside the line on which calibrated bins lie.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError(
                f"{_DIAGRAM}.plot: needs matplotlib: pip install 'tilework[bench]' ({error})"
            ) from error
        if ax is None:
            ax = pyplot.subplots()[1]
        full = self.count > 0
        lower, upper, confidence, accuracy, count = (
            values[full].double().cpu().numpy()
            for values in (self.edges[:-1], self.edges[1:], *self[:3])
        )
        widths = upper - lower
        shares = count / count.sum()
        ax.bar(lower, shares, widths, align="edge", color="0.85", label="share of positions")
        ax.plot([0, 1], [0, 1], color="0.5", linestyle="--", label="calibrated")
        ax.plot(confidence, accuracy, color="#0b6e4f", marker="o", label="accuracy")
        distance = float(self.calibration_error())
        ax.set(
            xlabel="confidence",
            ylabel="accuracy",
            xlim=(0, 1),
            ylim=(0, 1),
            title=f"{len(self.count)} bins, expected calibration error {distance:.3g}",
        )
        ax.legend(loc="upper left")
        return ax


def _top_class(
    function: str, input: Tensor, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each position, flat: the largest probability, whether it is right, whether it counts."""
    _checks.integer(function, "ignore_index", ignore_index)
    if isinstance(input, Tensor):
        input = input.detach()
    positions = class_index.positions(function, input, target, ignore_index)
    largest, top = positions.logits.max(positions.dim)
    confidence = (largest - positions.logits.logsumexp(positions.dim)).exp()
    correct = top == positions.target
    return confidence.flatten(), correct.flatten(), positions.kept.flatten()


def _diagram(
    function: str, confidence: Tensor, correct: Tensor, kept: Tensor, num_bins: int, binning: str
) -> ReliabilityDiagram:
    _checks.count(function, "num_bins", num_bins)
    _checks.one_of(function, "binning", binning, BINNINGS)
    ends = torch.tensor([0.0, 1.0], dtype=confidence.dtype, device=confidence.device)
    if binning == "equal_mass" and confidence.shape[0]:
        # Each bin starts at the confidence of its first position; what is not kept comes last.
        ascending = confidence.where(kept, torch.inf).sort().values
        starts = torch.arange(1, num_bins, device=kept.device) * kept.sum() // num_bins
        inner = ascending[starts]
    else:
        inner = torch.linspace(0, 1, num_bins + 1, dtype=ends.dtype, device=ends.device)[1:-1]
    edges = torch.cat([ends[:1], inner, ends[1:]])
    bins = torch.bucketize(confidence, inner, right=True, out_int32=True)
    bins = bins.where(kept, num_bins)
    # One bin at a time: all at once, they would take as many times the memory of the positions.
    parts = []
    for number in range(num_bins):
        members = bins == number
        total = confidence.where(members, 0).sum()
        parts.append((total, members.sum(), (members & correct).sum()))
    total, count, right = (torch.stack(part) for part in zip(*parts, strict=True))
    right = right.to(confidence.dtype)
    return ReliabilityDiagram(total / count, right / count, count, edges)
