"""Label-distributionally robust losses, against logsumexp and optimizers over distributions."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import entropy
from torch import Tensor

from tilework.losses import (
    ALDRKLLoss,
    LDRKLLoss,
    aldr_kl_loss,
    ldr_kl_loss,
    linear_ldr_kl_loss,
)

import samples
from helpers import FLOATING, assert_exact, dtype_name
from losses.linear_forms import LinearForm
from losses.samples import Loss, class_index


def gaps_of(input: Tensor, target: Tensor, margin: float) -> Tensor:
    """The gaps of rows; a class for each target."""
    wrong = 1 - F.one_hot(target, input.shape[1]).to(input.dtype)
    return input - input.gather(1, target[:, None]) + margin * wrong


def soft_maximum(gaps: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return gaps.amax(1)
    if temperature == math.inf:
        return gaps.mean(1)
    return temperature * (torch.logsumexp(gaps / temperature, 1) - math.log(gaps.shape[1]))


def reduced(losses: Tensor, kept: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses.where(kept, 0)
    return getattr(losses[kept], reduction)()


def definition(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    margin: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    kept = target != ignore_index
    gaps = gaps_of(input, target.where(kept, 0), margin)
    return reduced(soft_maximum(gaps, temperature), kept, reduction)


def temperature_of(gaps: Tensor, temperature: float, alpha: float, num_steps: int) -> float:
    """The temperature of a row of gaps in float64."""
    classes, current = len(gaps), temperature
    for _ in range(num_steps):
        p = (gaps.detach().double() / current).softmax(0)
        divergence = entropy(p.numpy(), [1 / classes] * classes)
        current = temperature * (1 - divergence / (alpha * math.log(classes)))
    return current


def adaptive_definition(
    input: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    alpha: float = 2.0,
    margin: float = 0.0,
    num_steps: int = 10,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    kept = target != ignore_index
    gaps = gaps_of(input, target.where(kept, 0), margin)
    losses = []
    for row in gaps:
        chosen = temperature_of(row, temperature, alpha, num_steps)
        rigidity = alpha * math.log(len(row)) / temperature
        penalty = rigidity / 2 * (chosen - temperature) ** 2
        losses.append(soft_maximum(row[None], chosen)[0] - penalty)
    stacked = torch.stack(losses) if losses else input.sum(1)
    return reduced(stacked, kept, reduction)


REFUSED: samples.Refusals = (
    ("margin must be a finite number of at least 0", ValueError, {"margin": -1.0}),
    ("margin must be a number", TypeError, {"margin": None}),
    ("temperature must be a number", TypeError, {"temperature": "1"}),
    ("ignore_index must be an int", TypeError, {"ignore_index": 1.0}),
    ("reduction must be one of", ValueError, {"reduction": "average"}),
)
REFUSED_TEMPERATURES: samples.Refusals = tuple(
    ("temperature must be a finite number above 0", ValueError, {"temperature": outside})
    for outside in (-1e-3, -math.inf, math.nan, 0.0, math.inf)
)


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            ldr_kl_loss,
            definition,
            LDRKLLoss,
            options=(
                {},
                {"temperature": 0.3, "margin": 1.5},
                {"temperature": 0.0, "margin": 0.5},
                {"temperature": math.inf, "margin": 0.5},
            ),
            refuses=(
                *REFUSED,
                *(
                    (
                        "temperature must be a number of at least",
                        ValueError,
                        {"temperature": outside},
                    )
                    for outside in (-1e-3, -math.inf, math.nan)
                ),
            ),
        ),
        Loss(
            aldr_kl_loss,
            adaptive_definition,
            ALDRKLLoss,
            # Before the temperatures converge they are no constants to a finite difference.
            options=(
                {"num_steps": 0, "margin": 0.5},
                {"num_steps": 14, "alpha": 6.0, "margin": 1.0, "temperature": 2.0},
            ),
            twice=False,
            refuses=(
                *REFUSED,
                *REFUSED_TEMPERATURES,
                ("input must be of shape .*, C >= 2", ValueError, {"input": torch.zeros(4, 1)}),
                ("alpha must be a finite number above 1", ValueError, {"alpha": 1.0}),
                ("alpha must be a finite number above 1", ValueError, {"alpha": math.inf}),
                ("alpha must be a number", TypeError, {"alpha": "2"}),
                ("num_steps must be an int of at least 0, got -1", ValueError, {"num_steps": -1}),
                ("num_steps must be an int", TypeError, {"num_steps": 1.0}),
            ),
        ),
    ]


@samples.of(LinearForm)
def forms() -> list[LinearForm]:
    return [
        LinearForm(
            linear_ldr_kl_loss,
            definition,
            options=({}, {"temperature": 0.5}, {"temperature": 3.0}),
            refuses=REFUSED_TEMPERATURES,
        )
    ]


def test_at_1_is_cross_entropy() -> None:
    input, target = class_index(20).values()
    expected = F.cross_entropy(input, target) - math.log(7)
    torch.testing.assert_close(ldr_kl_loss(input, target), expected)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_is_the_worst_distribution(temperature: float) -> None:
    """Searched for on the simplex, as logits of a distribution."""
    input, target = class_index(4, classes=5, scale=1.0).values()
    target = target.clamp(min=0)
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    actual = ldr_kl_loss(input, target, temperature=temperature, margin=0.7, reduction="none")
    for row, value in zip(gaps_of(input, target, 0.7), actual, strict=True):

        def negated(logits: Any, row: Tensor = row) -> tuple[float, Any]:
            leaf = torch.tensor(logits, requires_grad=True)
            p = leaf.softmax(0)
            value = temperature * F.kl_div(uniform.log(), p, reduction="sum") - p @ row
            (gradient,) = torch.autograd.grad(value, leaf)
            return value.item(), gradient.numpy()

        best = minimize(negated, [0.0] * 5, jac=True, tol=1e-12)
        assert -best.fun == pytest.approx(value.item(), abs=1e-6)


@given(st.integers(0, 10**6), st.floats(0.05, 20), st.floats(0, 3), st.integers(1, 100))
@settings(deadline=None)
def test_properties(seed: int, temperature: float, margin: float, classes: int) -> None:
    torch.manual_seed(seed)
    input, target = class_index(9, classes=classes).values()
    target = target.clamp(min=0)

    def losses(temperature: float, shift: float = 0.0) -> Tensor:
        return ldr_kl_loss(
            input + shift, target, temperature=temperature, margin=margin, reduction="none"
        )

    hot, middle, cold = (losses(factor * temperature) for factor in (1.5, 1.0, 0.5))
    slack = 1e-12
    assert (hot <= middle + slack).all()
    assert (middle <= cold + slack).all()
    assert (middle <= (hot + cold) / 2 + slack).all()
    gaps = gaps_of(input, target, margin)
    torch.testing.assert_close(losses(0.0), gaps.amax(1), rtol=0, atol=1e-28)
    assert (cold <= losses(0.0) + slack).all()
    assert (hot >= losses(math.inf) - slack).all()
    torch.testing.assert_close(losses(math.inf), gaps.mean(1))
    torch.testing.assert_close(losses(temperature, shift=5.0), middle, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("temperature", [1e-300, 1e-20, 1e-3, 1e3, 1e6, 1e12, 1e300])
def test_extreme_temperatures(dtype: torch.dtype, temperature: float) -> None:
    """Exact to the rounding of the logits, not of ``temperature * log(C)``."""
    input, target = class_index(30).values()
    input, target = input.to(dtype), target.clamp(min=0)
    leaf, exact = input.clone().requires_grad_(), input.double()
    actual = ldr_kl_loss(leaf, target, temperature=temperature, reduction="none")
    gaps = gaps_of(exact, target, 0.0)
    if temperature < 1e-19:
        truth, weights = gaps.amax(1), F.one_hot(gaps.argmax(1), 7).double()
    elif temperature < 1:
        truth, weights = soft_maximum(gaps, temperature), (gaps / temperature).softmax(1)
    else:
        # The first terms in the inverse temperature.
        variance = gaps.var(1, correction=0)
        third = (gaps - gaps.mean(1, keepdim=True)).pow(3).mean(1)
        truth = gaps.mean(1) + variance / (2 * temperature) + third / 6 / temperature / temperature
        weights = (gaps / temperature).softmax(1)
    eps = torch.finfo(dtype).eps
    largest = gaps.abs().amax(1)
    left_out = largest**4 / temperature / temperature / temperature if temperature > 1 else 0
    bound = left_out + 8 * eps * largest
    assert ((actual.double() - truth).abs() <= bound).all()
    (gradient,) = torch.autograd.grad(actual.sum(), leaf)
    expected = weights - F.one_hot(target, 7)
    atol = 4 * eps * (1 + 10 / temperature if 1e-19 < temperature < 1 else 1)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=atol)


def test_largest_of_equals_share_the_gradient() -> None:
    input = torch.tensor([[1.0, 3.0, 3.0, -2.0]], requires_grad=True)
    loss = ldr_kl_loss(input, torch.tensor([0]), temperature=0.0)
    (gradient,) = torch.autograd.grad(loss, input)
    assert loss.item() == 2
    assert gradient.tolist() == [[-1.0, 0.5, 0.5, 0.0]]
    right = ldr_kl_loss(torch.tensor([[9.0, 3.0]]), torch.tensor([0]), temperature=0.0)
    assert abs(right) < 1e-28


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("temperature", [0.0, 0.5, 10.0, math.inf])
def test_far_logits(dtype: torch.dtype, temperature: float) -> None:
    size = torch.tensor(1e4, dtype=dtype).item()
    input = torch.tensor([[size, -size, 0.0], [-size, size, 0.0]], dtype=dtype)
    target, options = torch.tensor([0, 0]), {"temperature": temperature, "reduction": "none"}
    for loss, exact in ((ldr_kl_loss, definition), (aldr_kl_loss, adaptive_definition)):
        if loss is aldr_kl_loss and temperature in (0.0, math.inf):
            continue
        leaf, double = (tensor.clone().requires_grad_() for tensor in (input, input.double()))
        actual, truth = loss(leaf, target, **options), exact(double, target, **options)
        composition = truth.float() if dtype == torch.float64 else truth.to(dtype)
        assert_exact(actual, composition, truth.to(dtype).double(), dtype)
        gradients = (
            torch.autograd.grad(value.sum(), inputs)[0]
            for value, inputs in ((actual, leaf), (truth, double))
        )
        torch.testing.assert_close(*map(Tensor.double, gradients), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("options", [{"num_steps": 0}, {"alpha": 1e15}, {"alpha": 1e300}])
def test_adaptive_without_adaptation(options: dict[str, Any]) -> None:
    input, target = class_index(20).values()
    for dtype in (torch.float32, torch.float64):
        actual = aldr_kl_loss(input.to(dtype), target, temperature=0.4, margin=0.3, **options)
        expected = ldr_kl_loss(input.to(dtype), target, temperature=0.4, margin=0.3)
        torch.testing.assert_close(actual, expected)


def test_adaptive_is_the_largest_over_temperatures() -> None:
    """Searched for in a fine grid; a large alpha leaves one maximum."""
    input, target = class_index(10, scale=1.0).values()
    target = target.clamp(min=0)
    temperature, alpha = 0.8, 6.0
    actual = aldr_kl_loss(
        input, target, temperature=temperature, alpha=alpha, num_steps=100, reduction="none"
    )
    grid = torch.linspace(temperature * (1 - 1 / alpha), 2 * temperature, 20001).double()
    rigidity = alpha * math.log(7) / temperature
    for row, value in zip(gaps_of(input, target, 0.0), actual, strict=True):
        candidates = grid * (torch.logsumexp(row / grid[:, None], 1) - math.log(7))
        candidates = candidates - rigidity / 2 * (grid - temperature) ** 2
        assert candidates.max().item() == pytest.approx(value.item(), abs=1e-6)


@given(st.integers(0, 10**6), st.floats(0.1, 5), st.floats(1.01, 20), st.integers(2, 50))
@settings(deadline=None, max_examples=30)
def test_adaptive_properties(seed: int, temperature: float, alpha: float, classes: int) -> None:
    torch.manual_seed(seed)
    input, target = class_index(2, classes=classes).values()
    target = target.clamp(min=0)
    options: dict[str, Any] = {"temperature": temperature, "alpha": alpha, "reduction": "none"}
    steps = [aldr_kl_loss(input, target, num_steps=k, **options) for k in (0, 1, 2, 5, 20)]
    # Each step takes the best distribution, then the best temperature.
    for fewer, more in itertools.pairwise(steps):
        assert (more >= fewer - 1e-10).all()
    gaps = gaps_of(input, target, 0.0)
    for row, value in zip(gaps, steps[-1], strict=True):
        path = [temperature_of(row, temperature, alpha, k) for k in (0, 1, 2, 5, 20)]
        assert path == sorted(path, reverse=True)
        assert path[-1] >= temperature * (1 - 1 / alpha) - 1e-12
        assert value <= row.amax() + 1e-10
    moved = aldr_kl_loss(input + 3, target, num_steps=20, **options)
    torch.testing.assert_close(moved, steps[-1], rtol=1e-9, atol=1e-9)


def test_adaptive_is_more_so_for_certain_positions() -> None:
    """The gradient of a certain, wrong position is nearer to that of its largest gap."""
    target = torch.tensor([1])
    for size, nearly_one in ((1.0, False), (9.0, True)):
        input = torch.tensor([[size, 0.0, 0.0, 0.0]], requires_grad=True)
        fixed, adapted = (
            torch.autograd.grad(loss(input, target), input)[0][0, 0]
            for loss in (ldr_kl_loss, aldr_kl_loss)
        )
        assert adapted > fixed
        assert (adapted > 1 - 1e-6) == nearly_one


def test_adaptive_second_derivatives_are_those_of_a_fixed_temperature() -> None:
    row, target = torch.randn(5, dtype=torch.float64), torch.tensor(2)
    options: dict[str, Any] = {"temperature": 0.7, "alpha": 3.0}
    gaps = gaps_of(row[None], target[None], 0.0)[0]
    chosen = temperature_of(gaps, 0.7, 3.0, 10)
    assert chosen < 0.7
    actual, expected = (
        torch.autograd.functional.hessian(
            lambda input, loss=loss, o=o: loss(input, target, **o), row
        )
        for loss, o in ((aldr_kl_loss, options), (ldr_kl_loss, {"temperature": chosen}))
    )
    torch.testing.assert_close(actual, expected)


def test_adaptive_at_smallest_alpha() -> None:
    input, target = class_index(20).values()
    for dtype in (torch.float32, torch.float64):
        leaf = (50 * input).to(dtype).requires_grad_()
        loss = aldr_kl_loss(leaf, target, alpha=1 + 1e-9, num_steps=30)
        loss.backward()
        assert loss.isfinite()
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_linear_form_rounds_the_temperature() -> None:
    """Its error is one of the temperature, that of the plain loss one of the logits."""
    hidden, head = torch.randn(200, 4), torch.randn(50, 4)
    target = torch.randint(50, (200,))
    logits = (hidden.double() @ head.double().T)[:, :]
    temperature = 1e4
    options: dict[str, Any] = {"temperature": temperature, "reduction": "none"}
    truth = ldr_kl_loss(logits, target, **options)
    linear = linear_ldr_kl_loss(hidden, head, target, **options) - truth
    plain = ldr_kl_loss(logits.float(), target, **options) - truth
    eps = torch.finfo(torch.float32).eps
    assert plain.abs().max() < 4 * eps * logits.abs().max()
    assert 0.1 * eps * temperature < linear.abs().max() < 4 * eps * temperature


@pytest.mark.untyped
def test_linear_form_has_no_margin() -> None:
    tensors = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError, match="margin"):
        linear_ldr_kl_loss(*tensors, margin=0.0)  # type: ignore[call-arg]


@pytest.mark.untyped
def test_one_class() -> None:
    target = torch.zeros(4, dtype=torch.int64)
    assert not ldr_kl_loss(torch.zeros(4, 1), target).any()
    assert ldr_kl_loss(torch.full((4, 1), torch.nan), target).isnan()
