"""What losses and measures hold at once: a few times their input, however many bins they sort."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tilework import losses
from tilework.losses import ReliabilityDiagram, TemperatureScaling

from helpers import Memory

ROWS = 100_000
Call = Callable[[], tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]


def logits(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(ROWS, classes), torch.randint(classes, (ROWS,))


def confidence() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(ROWS), torch.rand(ROWS) < 0.5


def labels() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(ROWS, 10), torch.rand(ROWS, 10) < 0.3


CALLS: dict[str, Call] = {
    "expected_calibration_error": lambda: (losses.expected_calibration_error, logits(3)),
    "from_confidence": lambda: (ReliabilityDiagram.from_confidence, confidence()),
    "from_confidence of equal mass": lambda: (
        lambda *tensors: ReliabilityDiagram.from_confidence(*tensors, binning="equal_mass"),
        confidence(),
    ),
    "many bins": lambda: (
        lambda *tensors: ReliabilityDiagram.from_confidence(*tensors, num_bins=100),
        confidence(),
    ),
    "TemperatureScaling.fit": lambda: (TemperatureScaling().fit, logits(30)),
    "best_f1_thresholds": lambda: (losses.best_f1_thresholds, labels()),
    "loss_based_reweighting": lambda: (losses.loss_based_reweighting, confidence()[:1]),
    "multilabel_focal_loss": lambda: (
        losses.multilabel_focal_loss,
        tuple(tensor.float() for tensor in labels()),
    ),
    "monotone_quantiles": lambda: (losses.monotone_quantiles, labels()[:1]),
    "quantile_crossing_penalty": lambda: (losses.quantile_crossing_penalty, labels()[:1]),
}


@pytest.mark.untyped
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_few_times_the_input(call: Call) -> None:
    function, tensors = call()
    with Memory(*tensors) as memory:
        function(*tensors)
    assert 0 < memory.peak <= 5 * sum(tensor.nbytes for tensor in tensors)


def test_what_counts() -> None:
    """Views of what was given do not; what is freed no longer does."""
    given = torch.zeros(1000)
    with Memory(given) as memory:
        given[10:].add_(1)
        assert memory.peak == 0
        double = given * 2
        assert memory.peak == 4000
        double = double * 2
        assert memory.peak == 8000
        del double
        _ = given * 3
        assert memory.peak == 8000
