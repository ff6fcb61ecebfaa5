"""Error norms against vector norms in float64, and cross-entropy truncated by hand."""

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilework.losses import (
    ErrorNormTruncationLoss,
    error_norm,
    error_norm_truncation_loss,
    linear_error_norm_truncation_loss,
)

import samples
from calls import Call
from helpers import FLOATING, HALF, dtype_name
from losses.linear_cross_entropy.problem import Problem
from losses.linear_forms import LinearForm
from losses.samples import Loss, class_index


def norm_of(input: Tensor, target: Tensor) -> Tensor:
    """The norms of rows in float64; a class for each target."""
    difference = input.double().softmax(1) - F.one_hot(target, input.shape[1])
    return torch.linalg.vector_norm(difference, dim=1)


def surviving(
    norms: Tensor, kept: Tensor, threshold: float | None, fraction: float | None
) -> Tensor:
    survives = kept.clone()
    if threshold is not None:
        survives &= norms <= threshold
    if fraction is not None and kept.any():
        ordered = sorted(norms[kept].tolist(), reverse=True)
        survives &= norms <= ordered[math.floor(fraction * len(ordered))]
    return survives


def definition(
    input: Tensor,
    target: Tensor,
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    denominator: str = "tokens",
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    kept = target != ignore_index
    norms = norm_of(input, target.where(kept, 0)).detach()
    survives = surviving(norms, kept, threshold, fraction)
    losses = F.cross_entropy(
        input,
        target,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    ).where(survives, 0)
    if reduction == "none":
        return losses
    count = (kept if denominator == "tokens" else survives).sum()
    return losses.sum() if reduction == "sum" else losses.sum() / count


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"threshold": 0.9, "label_smoothing": 0.1},
    {"threshold": 1.1, "denominator": "kept"},
    {"fraction": 0.25, "denominator": "kept", "label_smoothing": 0.2},
)
REFUSED: samples.Refusals = (
    (
        "threshold and fraction must not both be given, got threshold=1.0 and fraction=0.1",
        ValueError,
        {"threshold": 1.0, "fraction": 0.1},
    ),
    ("threshold must be a finite number of at least 0", ValueError, {"threshold": -0.1}),
    ("threshold must be a number", TypeError, {"threshold": "1"}),
    ("fraction must be a number of at least 0 and below 1", ValueError, {"fraction": 1.0}),
    ("fraction must be a number of at least 0 and below 1", ValueError, {"fraction": -0.1}),
    ("fraction must be a number,", TypeError, {"fraction": "0"}),
    ("denominator must be one of 'tokens', 'kept'", ValueError, {"denominator": "all"}),
    ("label_smoothing must be a number from 0 to 1", ValueError, {"label_smoothing": 1.5}),
    ("ignore_index must be an int", TypeError, {"ignore_index": 1.0}),
    ("reduction must be one of", ValueError, {"reduction": "average"}),
)


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            error_norm_truncation_loss,
            definition,
            ErrorNormTruncationLoss,
            options=OPTIONS,
            refuses=REFUSED,
        )
    ]


@samples.of(LinearForm)
def forms() -> list[LinearForm]:
    return [
        LinearForm(
            linear_error_norm_truncation_loss,
            definition,
            options=OPTIONS,
            refuses=REFUSED,
            steps=True,
        )
    ]


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_norm_equals_that_of_vectors(dtype: torch.dtype, scale: float) -> None:
    input, target = class_index(50, classes=63, scale=scale).values()
    input, kept = input.to(dtype), target >= 0
    actual = error_norm(input, target)
    assert actual.dtype == dtype
    assert not actual[~kept].any()
    truth = norm_of(input, target.clamp(min=0))
    rtol = 8 * max(torch.finfo(dtype).eps, 2.0**-50)
    torch.testing.assert_close(actual[kept].double(), truth[kept], rtol=rtol, atol=1e-15)
    assert (actual[kept] < math.sqrt(2)).all() or scale == 20.0
    assert (actual[kept] <= math.sqrt(2)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("size", [8.0, 20.0, 40.0, 60.0, 80.0])
def test_norm_of_confident_positions(dtype: torch.dtype, size: float) -> None:
    """Where one less the probability, and squares, have no digits left."""
    input = torch.tensor([[size, 0.0, 0.5, -1.0]], dtype=dtype)
    small = [math.exp(value - size) for value in (0.0, 0.5, -1.0)]
    total = 1 + sum(small)
    truth = math.hypot(*small, sum(small)) / total
    actual = error_norm(input, torch.tensor([0])).item()
    assert actual == pytest.approx(truth, rel=20 * torch.finfo(dtype).eps, abs=0)


def test_norm_of_one_and_of_two_classes() -> None:
    assert error_norm(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64)).tolist() == [0, 0, 0]
    input, target = class_index(9, classes=2).values()
    target = target.clamp(min=0)
    wrong = 1 - input.softmax(1)[torch.arange(9), target]
    torch.testing.assert_close(error_norm(input, target), math.sqrt(2) * wrong)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_norm_of_far_logits(dtype: torch.dtype) -> None:
    input = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]]).to(dtype)
    expected = torch.tensor([0.0, math.sqrt(2), math.sqrt(0.5)]).double().to(dtype)
    torch.testing.assert_close(error_norm(input, torch.tensor([0, 0, 0])), expected)


def test_norm_layouts() -> None:
    input, target = class_index(3, 2, 5).values()
    norms = error_norm(input, target)
    flat, labels = input.movedim(1, -1).flatten(0, -2), target.flatten()
    torch.testing.assert_close(norms.flatten(), error_norm(flat, labels))
    for row, label, norm in zip(flat, labels, norms.flatten(), strict=True):
        torch.testing.assert_close(error_norm(row, label), norm)
    wide = torch.stack([input, input], -1).requires_grad_()
    strided = error_norm(wide[..., 1], target)
    assert not strided.requires_grad
    torch.testing.assert_close(strided, norms)
    assert error_norm(input[:0], target[:0]).shape == (0, 2, 5)
    other = target.clamp(min=0)
    assert torch.equal(error_norm(input, other, ignore_index=3) == 0, other == 3)


@pytest.mark.parametrize("filling", [1e30, torch.inf, torch.nan])
def test_norm_of_ignored_and_of_nan(filling: float) -> None:
    input = torch.zeros(3, 4)
    input[1] = filling
    ignored = error_norm(input, torch.tensor([0, -100, 2]))
    assert ignored[1] == 0
    assert ignored.isfinite().all()
    shown = error_norm(input, torch.tensor([0, 1, 2]))
    assert shown.isnan().tolist() == [False, filling != 1e30, False]


@pytest.mark.untyped
def test_norm_transforms() -> None:
    input, target = class_index(3, 6).values()
    expected = torch.stack([error_norm(*pair) for pair in zip(input.mT, target, strict=True)])
    torch.testing.assert_close(torch.func.vmap(error_norm)(input.mT, target), expected)
    compiled = torch.compile(error_norm, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input, target), error_norm(input, target))
    gradient = torch.func.grad(lambda input: error_norm(input, target).sum())(input)
    assert not gradient.any()
    for dtype in HALF:
        with torch.autocast("cpu", dtype=dtype):
            half = error_norm(input.to(dtype), target)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, error_norm(input.to(dtype).float(), target))


@pytest.mark.parametrize("options", [{}, {"threshold": math.sqrt(2)}, {"fraction": 0.0}])
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_without_truncation_is_cross_entropy(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Also of positions whose norm is the largest that there is."""
    input, target = class_index(13, scale=100.0).values()
    input = input.to(dtype)
    for denominator in ("tokens", "kept"):
        for reduction in ("none", "sum", "mean"):
            for smoothing in (0.0, 0.1):
                shared: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
                actual = error_norm_truncation_loss(
                    input, target, denominator=denominator, **options, **shared
                )
                expected = F.cross_entropy(input.double(), target, **shared)
                torch.testing.assert_close(actual, expected.to(dtype))


@given(st.integers(0, 10**6), st.floats(0, 1, exclude_max=True), st.integers(0, 40))
@settings(deadline=None)
def test_fraction(seed: int, fraction: float, tokens: int) -> None:
    """The dropped are the floor(fraction * n) of largest norm, where none are equal."""
    torch.manual_seed(seed)
    input, target = class_index(tokens).values()
    losses = error_norm_truncation_loss(input, target, fraction=fraction, reduction="none")
    kept = target >= 0
    dropped = kept & (losses == 0)
    assert dropped.sum() == math.floor(fraction * int(kept.sum()))
    norms = error_norm(input, target)
    if dropped.any():
        assert norms[dropped].min() > norms[kept & ~dropped].max()


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 100])
def test_largest_fraction_leaves_one(tokens: int) -> None:
    input, target = class_index(tokens).values()
    largest = math.nextafter(1.0, 0.0)
    losses = error_norm_truncation_loss(
        input, target.clamp(min=0), fraction=largest, reduction="none"
    )
    assert (losses != 0).sum() == 1


def test_equal_norms_survive() -> None:
    input = torch.tensor([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0], [0.0, 1.0], [0.0, 3.0]])
    target = torch.zeros(5, dtype=torch.int64)
    for fraction, dropped in ((0.2, 1), (0.4, 1), (0.6, 1), (0.8, 4)):
        losses = error_norm_truncation_loss(input, target, fraction=fraction, reduction="none")
        assert (losses == 0).sum() == dropped
    limit = error_norm(input, target)[0].item()
    losses = error_norm_truncation_loss(input, target, threshold=limit, reduction="none")
    assert (losses == 0).tolist() == [False, False, False, False, True]


def test_dropped_positions_have_no_gradient() -> None:
    input, target = class_index(40).values()
    survivors = torch.full((40,), True)
    for threshold in (1.4, 1.0, 0.5, 0.1, 0.0):
        leaf = input.clone().requires_grad_()
        losses = error_norm_truncation_loss(leaf, target, threshold=threshold, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        left = losses != 0
        assert not gradient[~left].any()
        assert not (left & ~survivors).any()
        survivors = left
    assert not survivors.any()
    nothing = {"threshold": 0.0, "denominator": "kept"}
    assert error_norm_truncation_loss(input, target, **nothing).isnan()  # type: ignore[arg-type]
    assert error_norm_truncation_loss(input, target, threshold=0.0) == 0


def test_padding_is_not_counted() -> None:
    input, target = class_index(10).values()
    target = target.clamp(min=0)
    padded = torch.cat([input, torch.randn(50, 7).double()])
    marked = F.pad(target, (0, 50), value=-100)
    for fraction in (0.1, 0.3, 0.5):
        expected = error_norm_truncation_loss(input, target, fraction=fraction)
        actual = error_norm_truncation_loss(padded, marked, fraction=fraction)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("implementation", ["tiled", "reference"])
def test_linear_norms_are_exact_to_an_absolute_error(implementation: str) -> None:
    """The threshold at which a position is dropped is found by bisection."""
    hidden = torch.tensor([[0.0], [2.0], [6.0], [9.0], [12.0], [20.0]])
    head = torch.tensor([[1.0], [0.0], [-0.5], [0.3]])
    target = torch.zeros(6, dtype=torch.int64)
    truth = norm_of(hidden.double() @ head.double().T, target)
    low, high = torch.zeros(6).double(), torch.full((6,), 1.5).double()
    for index in range(6):
        for _ in range(40):
            middle = (low[index] + high[index]).item() / 2
            losses = linear_error_norm_truncation_loss(
                hidden[index, None],
                head,
                target[:1],
                threshold=middle,
                denominator="kept",
                implementation=implementation,
            )
            (high if losses.isfinite() else low)[index] = middle
    eps = torch.finfo(torch.float32).eps
    absolute = (high - truth).abs()
    assert (absolute <= torch.minimum(8 * eps / truth, 0.5 * truth) + 4 * eps).all()
    assert absolute[0] < 1e-6
    # Digits are lost where the norm is small.
    assert (absolute / truth).max() > 1e3 * eps


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("implementation", ["tiled", "reference", "triton"])
def test_linear_form_drops_the_same(implementation: str) -> None:
    problem = Problem.random(40, 6, 80, bias=True, implementation=implementation)
    bias = problem.linear_bias
    assert bias is not None
    logits = F.linear(problem.input, problem.linear_weight, bias).detach()
    for options in ({"fraction": 0.3}, {"threshold": 0.8}):
        plain = error_norm_truncation_loss(logits, problem.target, reduction="none", **options)
        problem.options |= {"reduction": "none", "threshold": None, "fraction": None} | options
        losses, grad_input, *_ = problem.solve(linear_error_norm_truncation_loss)
        assert torch.equal(losses == 0, plain == 0)
        assert not grad_input[losses == 0].any()
        assert grad_input[losses != 0].any(1).all()


def test_linear_form_ranks_confident_positions_last() -> None:
    hidden, head = torch.linspace(0, 30, 100)[:, None], torch.tensor([[1.0], [0.0], [-0.5], [0.3]])
    target = torch.zeros(100, dtype=torch.int64)
    for implementation in ("tiled", "reference"):
        losses = linear_error_norm_truncation_loss(
            hidden, head, target, fraction=0.1, implementation=implementation, reduction="none"
        )
        assert not losses[:10].any()
        assert losses[10:30].all()


def test_linear_form_passes_the_implementation_on(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("tilework.losses.classification.error_norm")
    chosen = []

    def record(*args: Any, **options: Any) -> Any:
        positions = of_head(*args, **options)
        chosen.append(positions.implementation)
        return positions

    of_head = module.of_head
    monkeypatch.setattr(module, "of_head", record)
    for implementation in (None, "tiled", "reference"):
        problem = Problem.random()
        linear_error_norm_truncation_loss(
            problem.input, problem.linear_weight, problem.target, implementation=implementation
        )
    assert chosen == ["chunked", "tiled", "reference"]


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_linear_form_drops_wrong_positions(dtype: torch.dtype) -> None:
    """Norms of about 0.06 and 1.4, far from the threshold."""
    head, place = 4 * torch.eye(6, dtype=dtype), torch.arange(30) % 6
    hidden = torch.eye(6, dtype=dtype)[place]
    wrong = torch.arange(30) % 4 == 1
    target = (place + wrong) % 6
    for options in ({"threshold": 0.7}, {"fraction": wrong.double().mean().item()}):
        losses = linear_error_norm_truncation_loss(
            hidden, head, target, reduction="none", **options
        )
        assert torch.equal(losses == 0, wrong)


@pytest.mark.parametrize("options", OPTIONS)
def test_nan_is_not_dropped(options: dict[str, Any]) -> None:
    input, target = class_index(9).values()
    input[4, 2] = torch.nan
    losses = error_norm_truncation_loss(input, target.clamp(min=0), **options, reduction="none")
    assert losses.isnan().tolist() == [index == 4 for index in range(9)]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("input must be a floating-point tensor", TypeError, {"input": torch.zeros(4, 3).int()}),
        ("input must be of shape", ValueError, {"input": torch.zeros(())}),
        ("target must be int64 of shape", TypeError, {"target": torch.zeros(4)}),
        ("target must be of shape", ValueError, {"target": torch.zeros(3).long()}),
        (
            "target must lie on the device of",
            ValueError,
            {"target": torch.zeros(4).long().to("meta")},
        ),
        ("target must lie in .*, got 3", IndexError, {"target": torch.tensor([0, 1, 2, 3])}),
        ("ignore_index must be an int", TypeError, {"ignore_index": 1.0}),
    ],
)
def test_bad_norm_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments = {"input": torch.zeros(4, 3), "target": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=f"^error_norm: {message}"):
        error_norm(**(arguments | change))


@pytest.mark.untyped
def test_norm_of_unread_bad_targets() -> None:
    norms = torch.func.vmap(error_norm, (None, 0))(torch.zeros(2, 3), torch.tensor([[0, 3]]))
    assert norms.isnan().tolist() == [[False, True]]
    with pytest.raises(TypeError, match="positional"):
        error_norm(torch.zeros(2, 3), torch.tensor([0, 1]), -100)  # type: ignore[misc]


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(error_norm, lambda: dict(class_index(5, 2))),
    ]
