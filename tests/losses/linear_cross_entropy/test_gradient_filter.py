"""What the gradient filter may leave out, measured against exact gradients in float64."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tilework.losses import (
    LinearCrossEntropy,
    LinearKLDivLoss,
    linear_cross_entropy,
    linear_kl_div,
    linear_log_probs,
)
from tilework.losses.linear_cross_entropy import tiled

from losses.linear_cross_entropy.problem import IMPLEMENTATIONS, Problem

pytestmark = pytest.mark.usefixtures("small_tiles")
CLASSES, FEATURES, TOKENS = 150, 16, 40


def rows(kind: str) -> Problem:
    """Positions whose softmax is near uniform, peaked, or one or the other."""
    scale = torch.full((TOKENS, 1), 0.05 if kind == "uniform" else 3.0, dtype=torch.float64)
    if kind == "mixed":
        scale[::2] = 0.05
    problem = Problem.random(TOKENS, FEATURES, CLASSES, torch.float64, bias=True)
    problem.input = (problem.input.detach() * scale).requires_grad_()
    return problem


def lost(problem: Problem, fraction: float, **options: Any) -> tuple[Tensor, Tensor]:
    """For each position, what was left out of its gradient by logits, and S of the bound.

    The weight holds the identity, so that the gradient of the input is that of the logits.
    """
    head = torch.cat([torch.eye(CLASSES), torch.randn(CLASSES, 3)], 1).double()
    hidden = problem.input.detach() @ problem.linear_weight.detach().T
    hidden = torch.cat([hidden, torch.zeros(TOKENS, 3)], 1).requires_grad_()
    bias = problem.linear_bias
    assert bias is not None

    def gradient(gradient_filter: float | None) -> Tensor:
        loss = linear_cross_entropy(
            hidden,
            head,
            problem.target,
            linear_bias=bias.detach(),
            reduction="sum",
            implementation="tiled",
            gradient_filter=gradient_filter,
            **options,
        )
        (result,) = torch.autograd.grad(loss, hidden)
        return result[:, :CLASSES]

    missing = (gradient(None) - gradient(fraction)).abs()
    kept = problem.target >= 0
    column = problem.target.where(kept, 0)[:, None]
    assert not missing.gather(1, column)[kept].any(), "the target's entry was left out"
    logits = F.linear(hidden.detach(), head, bias.detach())
    if options.get("softcap"):
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    weight = options.get("weight", torch.ones(CLASSES, dtype=torch.float64))
    smoothing = options.get("label_smoothing", 0.0)
    coefficient = (1 - smoothing) * weight[column[:, 0]] + smoothing / CLASSES * weight.sum()
    coefficient = coefficient + 2 * options.get("z_loss", 0.0) * logits.logsumexp(1).abs()
    coefficient = coefficient * options.get("token_weight", torch.ones(TOKENS)).abs()
    return missing.sum(1), coefficient.where(kept, 0)


@pytest.mark.parametrize("kind", ["uniform", "peaked", "mixed"])
@pytest.mark.parametrize("fraction", [1e-6, 1e-3, 0.1, 0.9])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"z_loss": 0.1},
        {"softcap": 6.0, "z_loss": 0.01},
        {"label_smoothing": 0.1, "weight": torch.rand(CLASSES).double()},
        {"token_weight": torch.linspace(-1, 2, TOKENS).double()},
    ],
    ids=["plain", "z_loss", "softcap", "smoothing", "token_weight"],
)
def test_bound(kind: str, fraction: float, options: dict[str, Any]) -> None:
    missing, coefficient = lost(rows(kind), fraction, **options)
    assert (missing <= fraction * coefficient * (1 + 1e-9) + 1e-15).all()


def test_z_loss_of_certain_rows_is_bounded() -> None:
    # Where p of the target is 1, softmax - onehot vanishes and the z term is all there is.
    problem = rows("peaked")
    logits = F.linear(problem.input, problem.linear_weight, problem.linear_bias)
    problem.target = logits.argmax(1)
    missing, coefficient = lost(problem, 0.01, z_loss=1.0)
    assert (missing <= 0.01 * coefficient).all()


def kept_fraction(problem: Problem, fraction: float, monkeypatch: pytest.MonkeyPatch) -> float:
    counts = []
    choose = tiled.large_classes

    def record(sizes: Tensor, budget: float) -> tuple[Tensor, float]:
        kept, spent = choose(sizes, budget)
        counts.append((len(kept), len(sizes)))
        return kept, spent

    with monkeypatch.context() as patch:
        patch.setattr(tiled, "large_classes", record)
        problem.solve(partial(linear_cross_entropy, gradient_filter=fraction))
    return sum(kept for kept, _ in counts) / sum(size for _, size in counts)


def test_peaked_rows_keep_few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem.random(TOKENS, FEATURES, CLASSES, bias=True, ignored=0.0)
    problem.target = problem.target % 20
    bias = torch.full((CLASSES,), -30.0)
    bias[:20] = 0
    problem.linear_bias = bias.requires_grad_()
    assert kept_fraction(problem, 1e-3, monkeypatch) < 0.3
    flat = Problem.random(TOKENS, FEATURES, CLASSES, scale=0.01, ignored=0.0)
    assert kept_fraction(flat, 1e-3, monkeypatch) > 0.9


def test_a_smaller_fraction_comes_closer() -> None:
    problem = rows("peaked")
    exact = problem.solve(linear_cross_entropy)
    errors = []
    for fraction in (0.9, 1e-2, 1e-5, 1e-12):
        actual = problem.solve(partial(linear_cross_entropy, gradient_filter=fraction))
        assert torch.equal(
            actual[3], problem.solve(partial(linear_cross_entropy, implementation="tiled"))[3]
        ), "the bias loses nothing"
        torch.testing.assert_close(actual[0], exact[0], rtol=1e-14, atol=0)
        errors.append(
            sum(
                (result - truth).abs().sum().item()
                for result, truth in zip(actual[1:3], exact[1:3], strict=True)
            )
        )
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-9


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_takes_it(implementation: str) -> None:
    problem = Problem.random(bias=True)
    function = partial(linear_cross_entropy, implementation=implementation, gradient_filter=1e-4)
    first, second = problem.solve(function), problem.solve(function)
    exact = problem.solve(partial(linear_cross_entropy, implementation=implementation))
    assert torch.equal(first[0], exact[0]) or implementation == "chunked"
    for result, again, truth in zip(first, second, exact, strict=True):
        assert torch.equal(result, again)
        torch.testing.assert_close(result, truth, rtol=1e-2, atol=1e-4)


def test_log_probs_are_bounded() -> None:
    head = torch.cat([torch.eye(CLASSES), torch.ones(CLASSES, 1)], 1).double()
    hidden = torch.cat([3 * torch.randn(TOKENS, CLASSES), torch.zeros(TOKENS, 1)], 1).double()
    hidden.requires_grad_()
    target = torch.randint(CLASSES, (TOKENS,))
    upstream = torch.randn(3, TOKENS, dtype=torch.float64)

    def gradient(gradient_filter: float | None) -> Tensor:
        fields = linear_log_probs(
            hidden, head, target, temperature=2.0, gradient_filter=gradient_filter
        )[:3]
        (result,) = torch.autograd.grad(fields, hidden, list(upstream))
        return result[:, :CLASSES]

    missing = (gradient(None) - gradient(0.01)).abs().sum(1)
    bound = 0.01 * ((upstream[0] - upstream[1]).abs() + upstream[2].abs()) / 2.0
    assert missing.any()
    assert (missing <= bound * (1 + 1e-9)).all()


@pytest.mark.untyped
@pytest.mark.parametrize("bad", [0.0, 1.0, -0.5, float("nan")])
def test_bad_fractions(bad: float) -> None:
    hidden, head = torch.zeros(2, 3), torch.zeros(4, 3)
    message = "gradient_filter must be None or a number above 0"
    for function in (linear_cross_entropy, linear_log_probs):
        with pytest.raises(ValueError, match=message):
            function(hidden, head, torch.tensor([0, 1]), gradient_filter=bad)
    with pytest.raises(ValueError, match=message):
        linear_kl_div(hidden, head, hidden, head, gradient_filter=bad)
    with pytest.raises(ValueError, match=message):
        LinearKLDivLoss(gradient_filter=bad)
    with pytest.raises(TypeError, match="gradient_filter must be a number"):
        LinearCrossEntropy(gradient_filter="some")  # type: ignore[arg-type]
