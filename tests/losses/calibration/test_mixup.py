"""Mixup, against torch's cross-entropy with each target, and against scipy's distributions."""

import collections
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from tilework.losses import MixupBatch, mixup_batch, mixup_cross_entropy

import samples
from calls import Call, draw
from helpers import FLOATING, dtype_name
from losses.samples import Arguments, Loss, class_index, zeros

FALSE_ALARM = 1e-6


def definition(
    input: Tensor,
    target: Tensor,
    mixed_target: Tensor,
    lam: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    parts = [
        F.cross_entropy(
            input,
            classes,
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        for classes in (target, mixed_target)
    ]
    kept = (target != ignore_index) & (mixed_target != ignore_index)
    lam = lam.reshape(*lam.shape, *[1] * (target.dim() - lam.dim()))
    losses = (lam * parts[0] + (1 - lam) * parts[1]) * kept
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / kept.sum()


def mixed(*positions: int, scalar: bool = False) -> Arguments:
    tensors = class_index(*positions)
    other = class_index(*positions)["target"]
    other.view(-1)[0].clamp_(min=0)
    return tensors | {
        "mixed_target": other,
        "lam": torch.rand(() if scalar else positions[:1], dtype=torch.float64),
    }


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            mixup_cross_entropy,
            definition,
            None,
            lambda: mixed(13),
            options=({}, {"label_smoothing": 0.2}),
            differentiable=("input", "lam"),
            batched=("input", "target", "mixed_target", "lam"),
            class_index=False,
            accepts=zeros() | {"mixed_target": torch.zeros(4, dtype=torch.int64), "lam": 0.5},
            refuses=(
                ("lam must be a number from 0 to 1", ValueError, {"lam": 1.5}),
                ("lam must be a number from 0 to 1", ValueError, {"lam": math.nan}),
                ("lam must be a number", TypeError, {"lam": "1"}),
                ("lam must be a floating-point tensor", TypeError, {"lam": torch.ones(4).int()}),
                (
                    r"lam must be a number, a scalar or of shape \(4,\)",
                    ValueError,
                    {"lam": torch.ones(4, 1)},
                ),
                (
                    r"lam must be a number, a scalar or of shape \(4,\)",
                    ValueError,
                    {"lam": torch.ones(3)},
                ),
                ("lam must be from 0 to 1 everywhere", ValueError, {"lam": torch.full((4,), 2.0)}),
                ("lam must lie on the device", ValueError, {"lam": torch.ones(4, device="meta")}),
                (
                    "label_smoothing must be a number from 0 to 1",
                    ValueError,
                    {"label_smoothing": 2.0},
                ),
                ("ignore_index must be an int", TypeError, {"ignore_index": 0.5}),
                (r"input must be of shape \(C\)", ValueError, {"input": torch.ones(())}),
                *(
                    case
                    for name in ("target", "mixed_target")
                    for case in (
                        (
                            rf"{name} must be int64 of shape \(4,\)",
                            TypeError,
                            {name: torch.ones(4)},
                        ),
                        (rf"{name} must be of shape \(4,\)", ValueError, {name: torch.tensor([1])}),
                        ("target must lie in", IndexError, {name: torch.full((4,), 3)}),
                    )
                ),
            ),
        ),
        Loss(
            mixup_cross_entropy,
            definition,
            None,
            lambda: mixed(5, 4, scalar=True),
            differentiable=("input", "lam"),
            batched=("input", "target", "mixed_target"),
            class_index=False,
        ),
    ]


@pytest.mark.parametrize("shape", [(7,), (5, 7), (5, 7, 3), (2, 7, 3, 2)])
def test_of_one_target_is_cross_entropy(shape: tuple[int, ...]) -> None:
    """In every combination of options, by lam = 1, by lam = 0 and by equal targets."""
    input = torch.randn(shape, dtype=torch.float64)
    dim = min(len(shape) - 1, 1)
    target, other = torch.randint(7, (2, *shape[:dim], *shape[dim + 1 :]))
    for ignore_index, smoothing, reduction in itertools.product(
        (-100, 3), (0.0, 0.1, 1.0), ("none", "sum", "mean")
    ):
        options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": smoothing,
            "reduction": reduction,
        }
        other = other.where(other != ignore_index, 0)
        expected = F.cross_entropy(input, target, **options)
        for first, second, lam in (
            (target, other, 1.0),
            (other, target, 0.0),
            (target, target, 0.3),
        ):
            actual = mixup_cross_entropy(input, first, second, lam, **options)
            torch.testing.assert_close(actual, expected, equal_nan=True)


def test_swapped_targets_with_the_other_part() -> None:
    tensors = mixed(9)
    swapped = mixup_cross_entropy(
        tensors["input"], tensors["mixed_target"], tensors["target"], 1 - tensors["lam"]
    )
    torch.testing.assert_close(swapped, mixup_cross_entropy(**tensors))


@pytest.mark.parametrize("filling", [1e30, torch.inf, torch.nan])
def test_positions_with_an_ignored_target_do_not_count(filling: float) -> None:
    tensors = mixed(13)
    target, mixed_target = (tensors[name].clamp(min=0) for name in ("target", "mixed_target"))
    target[2], mixed_target[5], target[7], mixed_target[7] = -100, -100, -100, -100
    ignored = torch.zeros(13, dtype=torch.bool)
    ignored[[2, 5, 7]] = True
    input = tensors["input"].clone()
    input[ignored] = filling
    input.requires_grad_()
    lam = tensors["lam"]
    losses = mixup_cross_entropy(input, target, mixed_target, lam, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), input)
    for values in (losses, gradient):
        assert not values[ignored].any()
        assert values[~ignored].isfinite().all()
    kept = [tensor[~ignored] for tensor in (input, target, mixed_target, lam)]
    torch.testing.assert_close(
        mixup_cross_entropy(input, target, mixed_target, lam), mixup_cross_entropy(*kept)
    )
    none = torch.full_like(target, -100)
    assert mixup_cross_entropy(input, none, mixed_target, lam).isnan()
    assert mixup_cross_entropy(input, target, none, lam, reduction="sum") == 0


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mixes_as_it_says(alpha: float, dtype: torch.dtype) -> None:
    input, target = torch.randn(7, 3, 2).to(dtype), torch.arange(14).reshape(7, 2)
    before = input.clone(), target.clone()
    batch = mixup_batch(input, target, alpha=alpha, generator=torch.Generator().manual_seed(0))
    assert isinstance(batch, MixupBatch)
    assert torch.equal(input, before[0])
    assert torch.equal(target, before[1])
    assert batch.lam.shape == ()
    assert batch.lam.dtype == batch.input.dtype == dtype
    assert batch.index.sort().values.tolist() == list(range(7))
    assert torch.equal(batch.target, target)
    lam = batch.lam.item()
    assert lam == 1 or alpha
    for i, j in enumerate(batch.index.tolist()):
        assert torch.equal(batch.mixed_target[i], target[j])
        expected = lam * input[i].double() + (1 - lam) * input[j].double()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(batch.input[i].double(), expected, rtol=eps, atol=2 * eps)


def test_the_generator_decides() -> None:
    input, target = torch.randn(100, 2), torch.arange(100)
    first, again, other = (
        mixup_batch(input, target, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.index, other.index)
    assert first.lam != other.lam
    torch.manual_seed(3)
    default = mixup_batch(input, target)
    torch.manual_seed(3)
    assert torch.equal(mixup_batch(input, target).input, default.input)


def draws(alpha: float, count: int = 4000) -> list[float]:
    generator = torch.Generator().manual_seed(11)
    one = torch.zeros(1, dtype=torch.float64)
    return [
        mixup_batch(one, one, alpha=alpha, generator=generator).lam.item() for _ in range(count)
    ]


@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0, 5.0])
def test_parts_are_beta_distributed(alpha: float) -> None:
    """A chi-square test in ten equally likely bins; its false alarms are one in a million."""

    def p_value(sample: list[float], alpha: float) -> float:
        bins = (stats.beta.cdf(sample, alpha, alpha) * 10).clip(0, 9.999).astype(int)
        counts = collections.Counter(bins.tolist())
        return float(stats.chisquare([counts[k] for k in range(10)]).pvalue)

    sample = draws(alpha)
    if alpha == 0.01:  # cdf steps at the ends, where the numbers run out
        sides = [round(value) for value in sample]
        assert stats.binomtest(sum(sides), len(sides)).pvalue > FALSE_ALARM
        near = sum(min(value, 1 - value) > 1e-9 for value in sample)
        expected = 1 - 2 * stats.beta.cdf(1e-9, alpha, alpha)
        assert stats.binomtest(near, len(sample), expected).pvalue > FALSE_ALARM
        return
    assert p_value(sample, alpha) > FALSE_ALARM
    assert p_value(draws(1.3 * alpha), alpha) < FALSE_ALARM
    assert p_value([value**1.2 for value in sample], alpha) < FALSE_ALARM


def test_permutations_are_equally_likely() -> None:
    generator = torch.Generator().manual_seed(12)
    input = torch.zeros(3)
    counts: collections.Counter[tuple[int, ...]] = collections.Counter()
    for _ in range(3000):
        counts[tuple(mixup_batch(input, input, generator=generator).index.tolist())] += 1
    observed = [counts[order] for order in itertools.permutations(range(3))]
    assert stats.chisquare(observed).pvalue > FALSE_ALARM
    # Without the identity, or with rotations only, it fails.
    biased = [0, *[600] * 5]
    assert stats.chisquare(biased).pvalue < FALSE_ALARM


def test_part_and_permutation_are_independent() -> None:
    generator = torch.Generator().manual_seed(13)
    input = torch.zeros(2, dtype=torch.float64)
    table = [[0, 0], [0, 0]]
    for _ in range(3000):
        batch = mixup_batch(input, input, generator=generator)
        table[int(batch.lam > 0.5)][int(batch.index[0])] += 1
    assert stats.chi2_contingency(table).pvalue > FALSE_ALARM


def test_tiny_alpha_never_gives_nan() -> None:
    """Both gamma variables of this shape underflow nearly always."""
    sample = draws(1e-4, 200)
    assert all(value in (0.0, 1.0) or 0 < value < 1 for value in sample)
    assert 50 < sum(value > 0.5 for value in sample) < 150


def test_batch_of_nothing() -> None:
    batch = mixup_batch(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert batch.input.shape == (0, 3)


def test_differentiates_the_inputs() -> None:
    input = torch.randn(5, 2, requires_grad=True)
    batch = mixup_batch(input, torch.arange(5))
    (gradient,) = torch.autograd.grad(batch.input.sum(), input)
    torch.testing.assert_close(gradient, torch.ones(5, 2))


@pytest.mark.untyped
def test_values_that_cannot_be_read_give_nan() -> None:
    input, target = torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.int64)
    lam = torch.tensor([[0.5, 1.5, -0.1]])

    def losses(input: Tensor, target: Tensor, other: Tensor, lam: Tensor) -> Tensor:
        return mixup_cross_entropy(input, target, other, lam, reduction="none")

    batched = torch.func.vmap(losses)
    assert batched(input, target, target, lam)[0].isnan().tolist() == [False, True, True]
    wrong = torch.tensor([[0, 4, -1]])
    half = torch.full((1, 3), 0.5)
    for pair in ((wrong, target), (target, wrong)):
        assert batched(input, *pair, half)[0].isnan().tolist() == [False, True, True]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        ("alpha must be a finite number of at least 0", ValueError, {"alpha": -1.0}),
        ("alpha must be a finite number of at least 0", ValueError, {"alpha": math.inf}),
        ("alpha must be a number", TypeError, {"alpha": "1"}),
        ("input must be a floating-point", TypeError, {"input": torch.zeros(4, 3).int()}),
        (r"input must be of shape \(N, \.\.\.\)", ValueError, {"input": torch.zeros(())}),
        ("target must be a tensor", TypeError, {"target": [0, 0, 0, 0]}),
        (r"target must be of shape \(4, \.\.\.\)", ValueError, {"target": torch.zeros(3)}),
        ("target must lie on the device", ValueError, {"target": torch.zeros(4, device="meta")}),
    ],
)
def test_bad_batch(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"input": torch.zeros(4, 3), "target": torch.zeros(4)}
    with pytest.raises(error, match=f"mixup_batch: {message}"):
        mixup_batch(**(arguments | change))


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            mixup_batch,
            lambda: {"input": draw(7, 3), "target": torch.randint(4, (7,))},
            differentiable=("input",),
        ),
    ]
