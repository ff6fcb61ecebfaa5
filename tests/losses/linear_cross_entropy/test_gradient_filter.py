"""What the gradient filter may leave out, measured against exact gradients in float64."""

import itertools
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
from tilework.losses._classes.linear import tiled

from helpers import dtype_name
from losses.linear_cross_entropy.problem import IMPLEMENTATIONS, Problem, composed

pytestmark = pytest.mark.usefixtures("small_tiles")
CLASSES, FEATURES, TOKENS = 100, 16, 40
FILTERING = ("tiled", "triton")


def rows(kind: str) -> Problem:
    """Positions whose softmax is near uniform, peaked, or one or the other."""
    scale = torch.full((TOKENS, 1), 0.05 if kind == "uniform" else 3.0, dtype=torch.float64)
    if kind == "mixed":
        scale[::2] = 0.05
    problem = Problem.random(TOKENS, FEATURES, CLASSES, torch.float64, bias=True)
    problem.input = (problem.input.detach() * scale).requires_grad_()
    return problem


def few_classes(classes: int = CLASSES, likely: int = 4) -> Problem:
    """Positions that share their likely classes, which lie far from each other."""
    problem = Problem.random(TOKENS, FEATURES, classes, bias=True, ignored=0.0)
    bias = torch.full((classes,), -30.0)
    bias[:: classes // likely] = 0
    problem.target = problem.target % likely * (classes // likely)
    problem.linear_bias = bias.requires_grad_()
    return problem


def lost(
    implementation: str, problem: Problem, *fractions: float, **options: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    """For each position: what each fraction left out of its gradient by logits, how much of that
    may be rounding, and S of the bound.

    The weight holds the identity, so that the gradient of the input is that of the logits.
    """
    head = torch.cat([torch.eye(CLASSES), torch.randn(CLASSES, 3)], 1)
    logits = F.linear(problem.input, problem.linear_weight, problem.linear_bias).detach().float()
    hidden = torch.cat([logits, torch.zeros(TOKENS, 3)], 1)
    dtype = torch.float32 if implementation == "triton" else torch.float64

    def gradient(function: Any, dtype: torch.dtype, **filtering: float) -> Tensor:
        leaf = hidden.to(dtype).requires_grad_()
        loss = function(
            leaf, head.to(dtype), problem.target, reduction="sum", **options, **filtering
        )
        (result,) = torch.autograd.grad(loss, leaf)
        return result[:, :CLASSES].double()

    function = partial(linear_cross_entropy, implementation=implementation)
    truth = gradient(composed, torch.float64)
    whole = gradient(function, dtype)
    results = [gradient(function, dtype, gradient_filter=fraction) for fraction in fractions]
    kept = problem.target >= 0
    column = problem.target.where(kept, 0)[:, None]
    for filtered in results:
        entry, exact = filtered.gather(1, column)[kept], whole.gather(1, column)[kept]
        assert torch.equal(entry, exact), "the target's entry was left out"
    logits = logits.double()
    if options.get("softcap"):
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    weight = options.get("weight", torch.ones(CLASSES, dtype=torch.float64))
    smoothing = options.get("label_smoothing", 0.0)
    coefficient = (1 - smoothing) * weight[column[:, 0]] + smoothing / CLASSES * weight.sum()
    coefficient = coefficient + 2 * options.get("z_loss", 0.0) * logits.logsumexp(1).abs()
    coefficient = coefficient * options.get("token_weight", torch.ones(TOKENS)).abs()
    return (
        [(filtered - truth).abs().sum(1) for filtered in results],
        (whole - truth).abs().sum(1),
        coefficient.where(kept, 0),
    )


@pytest.mark.parametrize("implementation", FILTERING)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("uniform", {}),
        ("peaked", {}),
        ("mixed", {}),
        ("peaked", {"z_loss": 0.1}),
        ("uniform", {"softcap": 6.0, "z_loss": 0.01}),
        ("mixed", {"softcap": 6.0, "z_loss": 0.01}),
        (
            "mixed",
            {"label_smoothing": 0.1, "weight": torch.arange(CLASSES).double().sin().abs()},
        ),
        ("peaked", {"token_weight": torch.linspace(-1, 2, TOKENS).double()}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_bound(implementation: str, kind: str, options: dict[str, Any]) -> None:
    fractions = (1e-3, 0.3) if implementation == "triton" else (1e-6, 1e-3, 0.1, 0.9)
    missing, rounding, coefficient = lost(implementation, rows(kind), *fractions, **options)
    precise = 1e-6 if implementation == "triton" else 1e-9
    for fraction, amount in zip(fractions, missing, strict=True):
        assert (amount <= fraction * coefficient * (1 + precise) + rounding).all()


@pytest.mark.parametrize("implementation", FILTERING)
def test_the_bound_is_used(implementation: str) -> None:
    problem = rows("uniform")
    problem.target = problem.target.clamp(max=20)
    (missing,), _, coefficient = lost(implementation, problem, 0.5)
    assert missing.sum() > 0.15 * coefficient.sum()


@pytest.mark.parametrize("implementation", FILTERING)
@pytest.mark.parametrize("z_loss", [0.0, 1.0])
def test_certain_rows_are_bounded(implementation: str, z_loss: float) -> None:
    # Where p of the target is 1, softmax - onehot vanishes and the z term is all there is.
    problem = rows("peaked")
    problem.input = (4 * problem.input.detach()).requires_grad_()
    logits = F.linear(problem.input, problem.linear_weight, problem.linear_bias)
    problem.target = logits.argmax(1)
    (missing,), rounding, coefficient = lost(implementation, problem, 0.01, z_loss=z_loss)
    assert (missing <= 0.01 * coefficient + rounding).all()


def kept_fraction(
    implementation: str,
    problem: Problem,
    fraction: float,
    monkeypatch: pytest.MonkeyPatch,
    upstream: Tensor | None = None,
) -> float:
    from tilework.losses._classes.linear.triton import filter

    counts = []
    large_classes, kept_tiles = tiled.large_classes, filter.kept_tiles

    def record_classes(sizes: Tensor, budget: float) -> tuple[Tensor, float]:
        kept, spent = large_classes(sizes, budget)
        counts.append((len(kept), len(sizes)))
        return kept, spent

    def record_tiles(*args: Any) -> Tensor:
        kept = kept_tiles(*args)
        counts.append((int(kept.sum()), kept.numel()))
        return kept

    with monkeypatch.context() as patch:
        patch.setattr(tiled, "large_classes", record_classes)
        patch.setattr(filter, "kept_tiles", record_tiles)
        function = partial(
            linear_cross_entropy, implementation=implementation, gradient_filter=fraction
        )
        problem.solve(function, upstream)
    return sum(kept for kept, _ in counts) / sum(size for _, size in counts)


@pytest.mark.parametrize("implementation", FILTERING)
def test_peaked_rows_keep_few_classes(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_fraction(implementation, few_classes(), 1e-3, monkeypatch) < 0.3
    flat = Problem.random(TOKENS, FEATURES, CLASSES, scale=0.01, ignored=0.0)
    assert kept_fraction(implementation, flat, 1e-3, monkeypatch) > 0.9


@pytest.mark.parametrize("implementation", FILTERING)
def test_rows_without_gradients_keep_nothing(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Flat rows would keep all classes, but the loss does not depend on them.
    problem = few_classes()
    assert problem.linear_bias is not None
    problem.options = {"reduction": "none"}
    with torch.no_grad():
        problem.linear_weight[:, 0] = -problem.linear_bias
        problem.input[:, 0] = 0
        problem.input[::2, 0] = 1
    upstream = torch.ones(TOKENS)
    upstream[::2] = 0
    assert kept_fraction(implementation, problem, 1e-3, monkeypatch, upstream) < 0.4
    assert kept_fraction(implementation, problem, 1e-3, monkeypatch) > 0.8


@pytest.mark.untyped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
@pytest.mark.parametrize(("tokens", "classes"), [(40, 100), (33, 64), (7, 35), (1, 1)])
def test_products_are_those_of_the_kept_tiles(
    tokens: int,
    classes: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Behind the features, the weight holds the identity, which brings the gradient by logits out.
    from tilework.losses._classes.linear.triton import filter

    sizes = []
    kept_tiles = filter.kept_tiles

    def record(masses: Tensor, scale: Tensor, left: Tensor, width: int, *args: Any) -> Tensor:
        kept = kept_tiles(masses, scale, left, width, *args)
        config = args[-1]
        for (row, column), keep in zip(
            torch.cartesian_prod(*map(torch.arange, kept.shape)), kept.flatten(), strict=True
        ):
            height = min(len(scale) - int(row) * config.block_rows, config.block_rows)
            columns = min(width - int(column) * config.block_columns, config.block_columns)
            sizes.append((int(keep), height * columns))
        return kept

    monkeypatch.setattr(filter, "kept_tiles", record)
    features = 11
    hidden = torch.cat([torch.randn(tokens, features), torch.zeros(tokens, classes)], 1).to(dtype)
    head = torch.cat([0.2 * torch.randn(classes, features), torch.eye(classes)], 1).to(dtype)
    likely = torch.randperm(classes)
    bias = torch.linspace(0, -6, classes)[likely.argsort()].to(dtype)
    problem = Problem(
        hidden.requires_grad_(),
        head.requires_grad_(),
        likely[torch.randint(min(classes, 9), (tokens,))],
        bias.requires_grad_(),
        {"reduction": "sum", "z_loss": 0.01},
    )
    function = partial(linear_cross_entropy, implementation="triton", gradient_filter=0.5)
    upstream = torch.tensor(1e3)  # so that float16 has all of the gradients
    _, grad_input, grad_weight, grad_bias = problem.solve(function, upstream)
    of_logits = grad_input[:, features:].double()
    assert int(of_logits.count_nonzero()) == sum(keep * size for keep, size in sizes)
    if (tokens, classes) == (40, 100):
        assert sum(keep for keep, _ in sizes) < 0.7 * len(sizes)
    torch.testing.assert_close(
        grad_input, (of_logits @ head.detach().double()).to(dtype), rtol=1e-2, atol=1e-2
    )
    torch.testing.assert_close(
        grad_weight, (of_logits.T @ hidden.detach().double()).to(dtype), rtol=1e-2, atol=1e-2
    )
    exact = problem.solve(partial(linear_cross_entropy, implementation="triton"), upstream)
    torch.testing.assert_close(grad_bias, exact[3])  # the bias loses nothing


@pytest.mark.parametrize("implementation", FILTERING)
def test_a_smaller_fraction_comes_closer(implementation: str) -> None:
    dtype = torch.float32 if implementation == "triton" else torch.float64
    problem = Problem.random(TOKENS, FEATURES, CLASSES, bias=True, scale=0.3)
    problem.linear_bias = torch.linspace(20, 0, CLASSES).requires_grad_()
    problem.target = problem.target.clamp(max=20)
    problem = problem.to(dtype)
    function = partial(linear_cross_entropy, implementation=implementation)
    exact = problem.solve(function)
    errors = []
    for fraction in (0.9, 1e-2, 1e-5, 1e-15):
        actual = problem.solve(partial(function, gradient_filter=fraction))
        assert torch.equal(actual[0], exact[0])
        torch.testing.assert_close(actual[3], exact[3])  # the bias loses nothing
        errors.append(
            sum(
                (result - truth).abs().sum().item()
                for result, truth in zip(actual[1:3], exact[1:3], strict=True)
            )
        )
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 100 * errors[2]
    assert errors[3] < 1e-9 if dtype == torch.float64 else 1e-5


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


@pytest.mark.parametrize("implementation", FILTERING)
def test_entropies_of_flat_rows_are_bounded(implementation: str) -> None:
    # Where entropies are large, so is what they bring to the gradient of the total.
    dtype = torch.float32 if implementation == "triton" else torch.float64
    hidden = torch.linspace(-3, 0, CLASSES, dtype=dtype)[None].requires_grad_()
    function = partial(
        linear_log_probs,
        hidden,
        torch.eye(CLASSES, dtype=dtype),
        torch.tensor([CLASSES - 1]),
        implementation=implementation,
    )
    gradients = [
        torch.autograd.grad(function(gradient_filter=fraction).entropy.sum(), hidden)[0]
        for fraction in (None, 0.3)
    ]
    missing = (gradients[0] - gradients[1]).abs().sum()
    assert 0 < missing <= 0.3


@pytest.mark.parametrize("implementation", FILTERING)
@pytest.mark.parametrize("fields", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("tokens", [1, 20])
def test_log_probs_are_bounded(implementation: str, fields: tuple[int, ...], tokens: int) -> None:
    dtype = torch.float32 if implementation == "triton" else torch.float64
    head = torch.cat([torch.eye(CLASSES), torch.ones(CLASSES, 1)], 1).to(dtype)
    logits = 3 * torch.randn(tokens, CLASSES) + torch.linspace(-20, 20, CLASSES)
    hidden = torch.cat([logits, torch.zeros(tokens, 1)], 1).to(dtype).requires_grad_()
    target = torch.randint(CLASSES - 20, CLASSES, (tokens,))
    upstream = torch.zeros(3, tokens, dtype=dtype)
    upstream[list(fields)] = torch.randn(len(fields), tokens, dtype=dtype)

    def gradient(gradient_filter: float | None) -> Tensor:
        results = linear_log_probs(
            hidden,
            head,
            target,
            temperature=2.0,
            implementation=implementation,
            gradient_filter=gradient_filter,
        )
        (result,) = torch.autograd.grad(
            [results[field] for field in fields], hidden, [upstream[field] for field in fields]
        )
        return result[:, :CLASSES]

    whole = gradient(None)
    for fraction in (0.01, 0.3):
        missing = (whole - gradient(fraction)).abs()
        bound = fraction * ((upstream[0] - upstream[1]).abs() + upstream[2].abs()) / 2.0
        assert missing.any()
        assert not missing.gather(1, target[:, None]).any()
        assert (missing.sum(1) <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("implementation", FILTERING)
def test_extreme_rows(implementation: str) -> None:
    function = partial(linear_cross_entropy, implementation=implementation, gradient_filter=0.1)

    # A whole tile of classes that have no part in anything.
    problem = few_classes()
    assert problem.linear_bias is not None
    problem.linear_bias = (
        problem.linear_bias.detach().where(problem.linear_bias == 0, -torch.inf).requires_grad_()
    )
    exact = problem.solve(partial(linear_cross_entropy, implementation=implementation))
    filtered = problem.solve(partial(function, gradient_filter=1e-9))
    for result, truth in zip(filtered, exact, strict=True):
        torch.testing.assert_close(result, truth)

    # Ignored rows are not read, those of nan show, in all classes.
    problem = few_classes()
    problem.target[::3] = -100
    problem.options = {"reduction": "sum", "ignore_index": -100}
    clean = problem.solve(function)
    with torch.no_grad():
        problem.input[::3] = torch.nan
    for result, truth in zip(problem.solve(function), clean, strict=True):
        assert torch.equal(result, truth)
    with torch.no_grad():
        problem.input[1] = torch.nan
    loss, grad_input, grad_weight, _ = problem.solve(function)
    assert loss.isnan()
    assert grad_input[1].isnan().all()
    assert grad_weight.isnan().all()
    assert grad_input[5].isfinite().all()

    # An infinite upstream must not be lost as small beside itself.
    problem = few_classes()
    problem.options = {"reduction": "none"}
    problem.input = problem.input.detach()[:1].requires_grad_()
    problem.target = problem.target[:1]
    upstream = torch.full((1,), torch.inf)
    _, *gradients = problem.solve(function, upstream)
    assert not any(gradient.isfinite().any() for gradient in gradients)


@pytest.mark.parametrize("implementation", FILTERING)
def test_ignore_index_may_be_a_class(implementation: str) -> None:
    problem = Problem.random(classes=50, ignore_index=3)
    function = partial(linear_cross_entropy, implementation=implementation)
    exact = problem.solve(function)
    filtered = problem.solve(partial(function, gradient_filter=1e-9))
    for result, truth in zip(filtered, exact, strict=True):
        torch.testing.assert_close(result, truth)


@pytest.mark.untyped
@pytest.mark.parametrize("needed", [*itertools.product([False, True], repeat=3)])
def test_any_subset_of_gradients(needed: tuple[bool, ...]) -> None:
    function = partial(linear_cross_entropy, implementation="triton", gradient_filter=0.1)
    problem = few_classes()
    everything = problem.solve(function)[1:]
    for leaf, need in zip(problem.leaves, needed, strict=True):
        leaf.requires_grad_(need)
    if not any(needed):
        return
    loss = function(
        problem.input, problem.linear_weight, problem.target, linear_bias=problem.linear_bias
    )
    loss.backward()
    for leaf, need, gradient in zip(problem.leaves, needed, everything, strict=True):
        if need:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-6, atol=1e-7)
        else:
            assert leaf.grad is None


@pytest.mark.untyped
def test_targets_outside_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    # As where reading targets would synchronize: nan, and no address outside the tensors.
    from tilework import _checks

    monkeypatch.setattr(_checks, "holds_values", lambda tensor: False)
    problem = few_classes()
    problem.options = {"reduction": "none"}
    problem.target[3], problem.target[20] = CLASSES + 1000, -7
    function = partial(linear_cross_entropy, implementation="triton", gradient_filter=0.1)
    _, grad_input, *_ = problem.solve(function)
    outside = torch.tensor([3, 20])
    assert grad_input[outside].isnan().all()
    assert grad_input[[0, 38]].isfinite().all()


@pytest.mark.untyped
@pytest.mark.parametrize("bad", [0.0, 1.0, -0.5, float("nan")])
def test_bad_fractions(bad: float) -> None:
    hidden, head = torch.zeros(2, 3), torch.zeros(4, 3)
    message = "gradient_filter must be a number above 0"
    for function in (linear_cross_entropy, linear_log_probs):
        with pytest.raises(ValueError, match=message):
            function(hidden, head, torch.tensor([0, 1]), gradient_filter=bad)
    with pytest.raises(ValueError, match=message):
        linear_kl_div(hidden, head, hidden, head, gradient_filter=bad)
    with pytest.raises(ValueError, match=message):
        LinearKLDivLoss(gradient_filter=bad)
    with pytest.raises(TypeError, match="gradient_filter must be a number"):
        LinearCrossEntropy(gradient_filter="some")  # type: ignore[arg-type]
