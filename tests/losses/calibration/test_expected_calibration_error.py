"""Calibration errors, against torchmetrics, scikit-learn's calibration curve and loops."""

import builtins
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_calibration_error,
)

from tilework.losses import ReliabilityDiagram, expected_calibration_error

import samples
from calls import Call
from helpers import FLOATING, dtype_name
from losses.samples import class_index

NORMS = ("l1", "l2", "max")
BINNINGS = ("uniform", "equal_mass")


def by_loops(
    confidence: list[float], correct: list[bool], num_bins: int, norm: str, binning: str
) -> float:
    """In equal mass, a bin starts at the confidence of rank floor(b N / B)."""
    count = len(confidence)
    ends = [b / num_bins for b in range(1, num_bins)]
    if binning == "equal_mass":
        ends = [sorted(confidence)[b * count // num_bins] for b in range(1, num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for i, value in enumerate(confidence):
        bins[sum(value >= end for end in ends)].append(i)
    total = 0.0
    for members in filter(None, bins):
        accuracy = sum(correct[i] for i in members) / len(members)
        gap = abs(accuracy - sum(confidence[i] for i in members) / len(members))
        share = len(members) / count
        if norm == "max":
            total = max(total, gap)
        else:
            total += share * (gap if norm == "l1" else gap**2)
    return math.sqrt(total) if norm == "l2" else total


@given(
    st.integers(1, 60),
    st.integers(1, 6),
    st.integers(1, 20),
    st.sampled_from(NORMS),
    st.integers(0, 10**6),
)
def test_equals_torchmetrics(rows: int, classes: int, num_bins: int, norm: str, seed: int) -> None:
    torch.manual_seed(seed)
    input = torch.randn(rows, classes + 1)  # so small that no confidence rounds to 1
    target = torch.randint(classes + 1, (rows,))
    actual = expected_calibration_error(input, target, num_bins=num_bins, norm=norm)
    expected = multiclass_calibration_error(
        input.softmax(1), target, classes + 1, n_bins=num_bins, norm=norm
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_of_probabilities_equals_torchmetrics(norm: str) -> None:
    confidence, correct = torch.rand(200), torch.rand(200) < 0.6
    diagram = ReliabilityDiagram.from_confidence(confidence, correct, num_bins=10)
    # The binary metric there takes the probability of the label 1, and so do we.
    expected = binary_calibration_error(confidence, correct.int(), n_bins=10, norm=norm)
    torch.testing.assert_close(diagram.calibration_error(norm), expected)


@pytest.mark.parametrize(
    ("binning", "strategy"), [("uniform", "uniform"), ("equal_mass", "quantile")]
)
def test_diagram_equals_scikit_learns(binning: str, strategy: str) -> None:
    confidence = torch.rand(150, dtype=torch.float64)
    correct = torch.rand(150).double() < confidence
    diagram = ReliabilityDiagram.from_confidence(confidence, correct, num_bins=15, binning=binning)
    accuracy, mean = calibration_curve(
        correct.numpy(), confidence.numpy(), n_bins=15, strategy=strategy
    )
    full = diagram.count > 0
    np.testing.assert_allclose(diagram.accuracy[full].numpy(), accuracy)
    np.testing.assert_allclose(diagram.confidence[full].numpy(), mean)
    if binning == "equal_mass":
        assert diagram.count.tolist() == [10] * 15


@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 17),
    st.sampled_from(NORMS),
    st.sampled_from(BINNINGS),
    st.integers(0, 10**6),
)
def test_equals_loops(
    rows: int, levels: int, num_bins: int, norm: str, binning: str, seed: int
) -> None:
    """Few levels of confidence make ties, which share a bin."""
    torch.manual_seed(seed)
    confidence = torch.randint(levels + 1, (rows,)).double() / levels
    correct = torch.rand(rows) < 0.7
    diagram = ReliabilityDiagram.from_confidence(
        confidence, correct, num_bins=num_bins, binning=binning
    )
    assert diagram.count.sum() == rows
    if binning == "uniform":  # multiples of 1 / levels may be ends of bins, which round
        confidence = confidence.clamp(max=0.999) + 1e-6
        diagram = ReliabilityDiagram.from_confidence(confidence, correct, num_bins=num_bins)
    expected = by_loops(confidence.tolist(), correct.tolist(), num_bins, norm, binning)
    assert diagram.calibration_error(norm).item() == pytest.approx(expected, abs=1e-12)
    order = torch.randperm(rows)
    moved = ReliabilityDiagram.from_confidence(
        confidence[order], correct[order], num_bins=num_bins, binning=binning
    )
    assert torch.equal(moved.count, diagram.count)
    torch.testing.assert_close(moved.accuracy, diagram.accuracy, equal_nan=True)


def test_ends_of_bins() -> None:
    """A bin holds its lower end, the last one both; torchmetrics gives 1 a bin of its own."""
    confidence = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.76, 1.0])
    correct = torch.ones(6, dtype=torch.bool)
    diagram = ReliabilityDiagram.from_confidence(confidence, correct, num_bins=4)
    assert diagram.count.tolist() == [1, 1, 1, 3]
    torch.testing.assert_close(diagram.edges, torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    ours = ReliabilityDiagram.from_confidence(
        torch.tensor([0.8, 1.0]), torch.tensor([True, False]), num_bins=4
    )
    assert ours.calibration_error().item() == pytest.approx(0.4)
    theirs = binary_calibration_error(torch.tensor([0.8, 1.0]), torch.tensor([1, 0]), n_bins=4)
    assert theirs.item() == pytest.approx(0.6)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("options", list(itertools.product(NORMS, BINNINGS)), ids=str)
def test_layouts_and_dtypes(options: tuple[str, str], dtype: torch.dtype) -> None:
    norm, binning = options
    named: dict[str, Any] = {"num_bins": 4, "norm": norm, "binning": binning}
    input, target = class_index(3, 2, 5).values()
    input = input.to(dtype).requires_grad_()
    before = input.detach().clone()
    actual = expected_calibration_error(input, target, **named)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not actual.requires_grad
    assert torch.equal(input, before)
    rows = input.detach().movedim(1, -1).reshape(-1, 7).double()
    kept = target.flatten() >= 0
    probabilities = rows[kept].softmax(1).max(1)
    correct = (probabilities.indices == target.flatten()[kept]).tolist()
    expected = by_loops(probabilities.values.tolist(), correct, 4, norm, binning)
    assert actual.item() == pytest.approx(expected, rel=1e-5)
    one = expected_calibration_error(input.detach()[0, :, 0, 0], torch.tensor(2), **named)
    row = input.detach()[0, :, 0, 0].double().softmax(0)
    assert one.item() == pytest.approx(abs(float(row.argmax() == 2) - row.max().item()), rel=1e-5)


def test_ignored_positions_do_not_count() -> None:
    input, target = class_index(40).values()
    poisoned = input.clone()
    poisoned[target == -100] = torch.nan
    kept = target != -100
    for norm, binning in itertools.product(NORMS, BINNINGS):
        options: dict[str, Any] = {"norm": norm, "binning": binning}
        expected = expected_calibration_error(input[kept], target[kept], **options)
        torch.testing.assert_close(
            expected_calibration_error(poisoned, target, **options), expected
        )
        marked = target.where(kept, 2)
        few = marked != 2
        torch.testing.assert_close(
            expected_calibration_error(input, marked, ignore_index=2, **options),
            expected_calibration_error(input[few], marked[few], **options),
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("binning", BINNINGS)
def test_of_nothing_and_nan(norm: str, binning: str) -> None:
    options: dict[str, Any] = {"norm": norm, "binning": binning}
    empty = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    assert expected_calibration_error(*empty, **options).isnan()
    ignored = torch.randn(4, 3), torch.full((4,), -100)
    assert expected_calibration_error(*ignored, **options).isnan()
    input, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    input[1, 1] = torch.nan
    assert expected_calibration_error(input, target, **options).isnan()


def test_calibrated_probabilities_have_a_small_error() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(40000, generator=generator)
    correct = torch.rand(40000, generator=generator) < confidence
    for binning in BINNINGS:
        diagram = ReliabilityDiagram.from_confidence(confidence, correct, binning=binning)
        assert diagram.calibration_error() < 0.02
        worse = ReliabilityDiagram.from_confidence(confidence.sqrt(), correct, binning=binning)
        assert worse.calibration_error() > 0.1


def test_diagram_from_logits() -> None:
    input, target = class_index(40).values()
    for binning in BINNINGS:
        diagram = ReliabilityDiagram.from_logits(input, target, num_bins=5, binning=binning)
        assert diagram.count.sum() == (target >= 0).sum()
        for norm in NORMS:
            expected = expected_calibration_error(
                input, target, num_bins=5, norm=norm, binning=binning
            )
            assert torch.equal(diagram.calibration_error(norm), expected)


@pytest.mark.untyped
@pytest.mark.parametrize("binning", BINNINGS)
def test_transforms(binning: str) -> None:
    input, target = torch.randn(2, 9, 4), torch.randint(4, (2, 9))

    def error(input: Tensor, target: Tensor) -> Tensor:
        return expected_calibration_error(input, target, num_bins=5, binning=binning)

    expected = torch.stack([error(*pair) for pair in zip(input, target, strict=True)])
    torch.testing.assert_close(torch.func.vmap(error)(input, target), expected)
    compiled = torch.compile(error, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input[0], target[0]), expected[0])
    wrong = torch.func.vmap(error)(input, target + 4)
    assert wrong.isnan().all()
    unread = torch.func.vmap(
        lambda c, r: ReliabilityDiagram.from_confidence(c, r).calibration_error()
    )
    correct = torch.ones(2, 3, dtype=torch.bool)
    values = torch.tensor([[0.5, 0.6, 0.7], [0.5, 1.6, 0.7]])
    assert unread(values, correct).isnan().tolist() == [False, True]


@pytest.mark.untyped
@pytest.mark.parametrize("binning", BINNINGS)
def test_plot(binning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    confidence, correct = torch.rand(50) * 0.7, torch.rand(50) < 0.5
    diagram = ReliabilityDiagram.from_confidence(confidence, correct, num_bins=8, binning=binning)
    axes = diagram.plot()
    try:
        full = diagram.count > 0
        assert full.all() == (binning == "equal_mass")
        lines = {line.get_label(): line.get_xydata() for line in axes.lines}
        np.testing.assert_allclose(
            lines["accuracy"], torch.stack(diagram[:2], 1)[full].numpy(), rtol=1e-6
        )
        np.testing.assert_allclose(lines["calibrated"], [[0, 0], [1, 1]])
        bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in axes.patches]
        expected = torch.stack([diagram.edges[:-1], diagram.edges.diff(), diagram.count / 50], 1)[
            full
        ]
        np.testing.assert_allclose(bars, expected.numpy(), rtol=1e-5)
        error = diagram.calibration_error()
        assert axes.get_title() == f"8 bins, expected calibration error {error:.3g}"
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("confidence", "accuracy")
        assert diagram.plot(ax=axes) is axes
    finally:
        pyplot.close("all")
    load = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("no module matplotlib")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"ReliabilityDiagram\.plot: needs matplotlib: pip inst"):
        diagram.plot()


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("num_bins must be an int of at least 1", ValueError, {"num_bins": 0}),
        ("num_bins must be an int", TypeError, {"num_bins": 2.5}),
        ("binning must be one of 'uniform', 'equal_mass'", ValueError, {"binning": "mass"}),
        ("ignore_index must be an int", TypeError, {"ignore_index": 0.5}),
        (r"input must be of shape \(C\)", ValueError, {"input": torch.ones(())}),
        ("input must be a floating-point", TypeError, {"input": torch.ones(4, 3).int()}),
        (r"target must be of shape \(4,\)", ValueError, {"target": torch.tensor([1])}),
        ("target must be int64", TypeError, {"target": torch.ones(4)}),
        ("target must lie in", IndexError, {"target": torch.full((4,), 3)}),
    ],
)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments = {"input": torch.zeros(4, 3), "target": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(error, match=f"expected_calibration_error: {message}"):
        expected_calibration_error(**arguments)
    with pytest.raises(error, match=rf"ReliabilityDiagram\.from_logits: {message}"):
        ReliabilityDiagram.from_logits(**arguments)


@pytest.mark.untyped
def test_bad_norm() -> None:
    input, target = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected_calibration_error: norm must be one of 'l1'"):
        expected_calibration_error(input, target, norm="l3")
    with pytest.raises(ValueError, match=r"ReliabilityDiagram\.calibration_error: norm must be on"):
        ReliabilityDiagram.from_logits(input, target).calibration_error("l3")


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("confidence must be a floating-point", TypeError, {"confidence": torch.ones(4).int()}),
        (r"confidence must be of shape \(N\)", ValueError, {"confidence": torch.ones(4, 1)}),
        ("confidence must be from 0 to 1", ValueError, {"confidence": torch.full((4,), 1.5)}),
        (r"correct must be bool of shape \(4,\)", TypeError, {"correct": torch.ones(4)}),
        (r"correct must be of shape \(4,\)", ValueError, {"correct": torch.tensor([True])}),
        (
            "correct must lie on the device",
            ValueError,
            {"correct": torch.ones(4, dtype=torch.bool, device="meta")},
        ),
        ("num_bins must be an int of at least 1", ValueError, {"num_bins": 0}),
        ("binning must be one of", ValueError, {"binning": "mass"}),
    ],
)
def test_bad_confidence(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "confidence": torch.ones(4),
        "correct": torch.ones(4, dtype=torch.bool),
    }
    with pytest.raises(error, match=rf"ReliabilityDiagram\.from_confidence: {message}"):
        ReliabilityDiagram.from_confidence(**(arguments | change))


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            expected_calibration_error,
            lambda: dict(class_index(13)),
            options=({"num_bins": 4}, {"num_bins": 4, "binning": "equal_mass"}, {"norm": "max"}),
        ),
    ]
