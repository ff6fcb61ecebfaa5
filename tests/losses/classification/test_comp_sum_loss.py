"""Comp-sum losses, against torch's cross-entropy and softmax and against sums of exponentials."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tilework.losses import (
    CompSumLoss,
    comp_sum_loss,
    linear_comp_sum_loss,
    smooth_adversarial_comp_sum_loss,
)

import samples
from helpers import FLOATING, assert_exact, dtype_name
from losses.linear_forms import LinearForm
from losses.samples import Arguments, Loss, class_index, zeros

TAUS = (0.0, 0.5, 1.3, 2.0, 4.0)


def reduced(losses: Tensor, weights: Tensor, reduction: str) -> Tensor:
    losses = losses.where(weights != 0, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / weights.sum()


def by_probability(input: Tensor, target: Tensor, tau: float) -> Tensor:
    """The loss of each position from torch's cross-entropy; a class for each target."""
    nll = F.cross_entropy(input, target, reduction="none")
    return nll if tau == 1 else (1 - nll.neg().exp() ** (tau - 1)) / (tau - 1)


def definition(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    tau: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    kept = target != ignore_index
    index = target.where(kept, 0)
    weights = kept.to(input.dtype) if weight is None else weight[index] * kept
    return reduced(weights * by_probability(input, index, tau), weights, reduction)


def adversarial_definition(
    input: Tensor,
    adversarial_input: Tensor,
    target: Tensor,
    *,
    tau: float = 1.0,
    rho: float = 1.0,
    nu: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    kept = target != ignore_index
    index = target.where(kept, 0)
    margins = (logits.gather(1, index[:, None]) - logits for logits in (input, adversarial_input))
    before, after = margins
    distance = (after - before).square().sum(1).sqrt()
    losses = by_probability(input / rho, index, tau) + nu * distance
    return reduced(losses, kept.to(input.dtype), reduction)


def adversarial() -> Arguments:
    tensors = class_index(13, scale=1.0)
    moved = tensors["input"] + 0.3 * torch.randn(13, 7).double()
    return {"input": tensors["input"], "adversarial_input": moved, "target": tensors["target"]}


REFUSED: samples.Refusals = (
    ("tau must be a finite number of at least 0", ValueError, {"tau": -0.5}),
    ("tau must be a finite number of at least 0", ValueError, {"tau": math.inf}),
    ("tau must be a number", TypeError, {"tau": "1"}),
    ("ignore_index must be an int", TypeError, {"ignore_index": 1.0}),
    ("reduction must be one of", ValueError, {"reduction": "average"}),
)


# The inverse of a smaller probability is beyond float16.
@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            comp_sum_loss,
            definition,
            CompSumLoss,
            lambda: class_index(13, scale=1.0),
            options=({}, {"tau": 0.0}, {"tau": 0.5}, {"tau": 2.0}),
            refuses=(
                *REFUSED,
                ("weight must be of shape", ValueError, {"weight": torch.ones(4)}),
                (
                    "weight must not require",
                    ValueError,
                    {"weight": torch.ones(3, requires_grad=True)},
                ),
                (
                    "weight must be a floating-point tensor",
                    TypeError,
                    {"weight": torch.ones(3).int()},
                ),
            ),
        ),
        Loss(
            comp_sum_loss,
            definition,
            CompSumLoss,
            lambda: class_index(13, scale=1.0, weight=True),
            options=({}, {"tau": 1.7}),
        ),
        Loss(
            smooth_adversarial_comp_sum_loss,
            adversarial_definition,
            None,
            adversarial,
            options=({}, {"tau": 1.7, "rho": 0.8, "nu": 2.0}, {"tau": 0.0, "rho": 3.0, "nu": 0.1}),
            differentiable=("input", "adversarial_input"),
            batched=("input", "adversarial_input", "target"),
            class_index=False,
            accepts=zeros() | {"adversarial_input": torch.zeros(4, 3)},
            refuses=(
                *REFUSED,
                ("rho must be a finite number above 0", ValueError, {"rho": 0.0}),
                ("nu must be a finite number of at least 0", ValueError, {"nu": -1.0}),
                ("input must be of shape", ValueError, {"input": torch.zeros(())}),
                (
                    "adversarial_input must be of shape",
                    ValueError,
                    {"adversarial_input": torch.zeros(3)},
                ),
                (
                    "adversarial_input must be of input's torch.float32, got float64",
                    TypeError,
                    {"adversarial_input": torch.zeros(4, 3).double()},
                ),
                (
                    "target must be int64 of shape",
                    TypeError,
                    {"target": torch.zeros(4, dtype=torch.int32)},
                ),
            ),
        ),
    ]


@samples.of(LinearForm)
def forms() -> list[LinearForm]:
    return [
        LinearForm(
            linear_comp_sum_loss,
            definition,
            options=({}, {"tau": 0.5}, {"tau": 1.7}, {"tau": 2.0}),
            weight=True,
            refuses=REFUSED,
        )
    ]


def test_members_of_the_family() -> None:
    input, target = class_index(40).values()
    target = target.clamp(min=0)
    at_target = torch.arange(40), target
    probability = input.softmax(1)[at_target]
    sum_exponential = (input - input[at_target][:, None]).exp().sum(1) - 1
    for tau, expected in (
        (0.0, sum_exponential),
        (1.0, F.cross_entropy(input, target, reduction="none")),
        (1.4, (1 - probability**0.4) / 0.4),
        (2.0, 1 - probability),
    ):
        actual = comp_sum_loss(input, target, tau=tau, reduction="none")
        torch.testing.assert_close(actual, expected)


@given(st.integers(0, 10**6), st.floats(0, 3), st.floats(-50, 50), st.integers(1, 100))
@settings(deadline=None)
def test_properties(seed: int, tau: float, shift: float, classes: int) -> None:
    torch.manual_seed(seed)
    input, target = class_index(9, classes=classes).values()
    losses = comp_sum_loss(input, target, tau=tau, reduction="none")
    assert (losses >= 0).all()
    moved = comp_sum_loss(input + shift, target, tau=tau, reduction="none")
    torch.testing.assert_close(moved, losses, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("step", [1e-3, -1e-3, 1e-9, -1e-9, 2.0**-52, -(2.0**-53)])
def test_is_continuous_at_1(dtype: torch.dtype, step: float) -> None:
    """The nearer, the closer: the loss is nll + (1 - tau) nll**2 / 2 + O((1 - tau)**2)."""
    input, target = class_index(30).values()
    input = input.to(dtype).requires_grad_()
    near, at = (comp_sum_loss(input, target, tau=tau, reduction="none") for tau in (1 + step, 1.0))
    bound = abs(step) * at.double().square() + 4 * torch.finfo(dtype).eps * at.double()
    assert ((near - at).double().abs() <= bound).all()
    gradients = (torch.autograd.grad(losses.sum(), input)[0] for losses in (near, at))
    rtol = 4 * torch.finfo(dtype).eps + 40 * abs(step)
    torch.testing.assert_close(*gradients, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("tau", [1.0, 1.3, 2.0, 4.0])
@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_gradient_of_hopeless_positions(dtype: torch.dtype, tau: float) -> None:
    """It is the power of a small probability, of which nothing may cancel."""
    input = torch.tensor([[0.0, 6.0, 1.0], [5.0, -4.0, 1.0]], dtype=dtype, requires_grad=True)
    target = torch.tensor([0, 1])
    (actual,) = torch.autograd.grad(comp_sum_loss(input, target, tau=tau), input)
    exact = input.detach().double()
    probabilities = exact.softmax(1)
    at_target = probabilities.gather(1, target[:, None])
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    truth = at_target ** (tau - 1) * (probabilities - F.one_hot(target, 3)) / 2
    torch.testing.assert_close(
        actual.double(), truth, rtol=30 * torch.finfo(dtype).eps, atol=smallest
    )


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("tau", [1.0, 1.001, 1.5, 2.0])
def test_far_logits(dtype: torch.dtype, tau: float) -> None:
    size = torch.tensor(1e4, dtype=dtype).item()
    input = torch.tensor([[size, -size], [-size, size]], dtype=dtype, requires_grad=True)
    losses = comp_sum_loss(input, torch.tensor([0, 0]), tau=tau, reduction="none")
    hopeless = 2 * size if tau == 1 else -math.expm1((1 - tau) * 2 * size) / (tau - 1)
    expected = torch.tensor([0.0, hopeless], dtype=torch.float64).to(dtype)
    torch.testing.assert_close(losses, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), input)
    slope = math.exp((1 - tau) * 2 * size)
    expected = torch.tensor([[0.0, 0.0], [-slope, slope]], dtype=torch.float64).to(dtype)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=0)


def test_beyond_the_range_is_infinite() -> None:
    target = torch.tensor([0, 1])
    for dtype, size in ((torch.float16, 12.0), (torch.float32, 100.0), (torch.float64, 1e4)):
        input = torch.tensor([[0.0, size]] * 2, dtype=dtype)
        first, second = comp_sum_loss(input, target, tau=0.0, reduction="none").tolist()
        assert first == math.inf
        assert 0 <= second < 1e-4


@pytest.mark.parametrize("tau", TAUS)
def test_adversarial_of_equal_inputs(tau: float) -> None:
    input, target = class_index(13).values()
    clean, perturbed = input.clone().requires_grad_(), input.clone().requires_grad_()
    actual = smooth_adversarial_comp_sum_loss(clean, perturbed, target, tau=tau)
    torch.testing.assert_close(actual, comp_sum_loss(input, target, tau=tau))
    actual.backward()
    assert clean.grad is not None
    assert perturbed.grad is not None
    assert not perturbed.grad.any()
    leaf = input.clone().requires_grad_()
    (expected,) = torch.autograd.grad(comp_sum_loss(leaf, target, tau=tau), leaf)
    torch.testing.assert_close(clean.grad, expected)


def test_adversarial_second_derivatives_of_equal_inputs() -> None:
    row, target = torch.randn(5).double(), torch.tensor(2)
    actual = torch.autograd.functional.hessian(
        lambda input, moved: smooth_adversarial_comp_sum_loss(input, moved, target), (row, row)
    )
    expected = torch.autograd.functional.hessian(lambda input: comp_sum_loss(input, target), row)
    torch.testing.assert_close(actual[0][0], expected)
    assert not any(part.any() for part in (actual[0][1], *actual[1]))


def test_adversarial_is_invariant_to_shifts_of_either_input() -> None:
    tensors = adversarial()
    expected = smooth_adversarial_comp_sum_loss(**tensors)
    for name in ("input", "adversarial_input"):
        moved = tensors | {name: tensors[name] + 3}
        torch.testing.assert_close(smooth_adversarial_comp_sum_loss(**moved), expected)


def test_adversarial_distance_is_that_of_margins() -> None:
    """(1, 2) in the margins of the wrong classes, whose norm is that of (1, 2, 0)."""
    clean, target = torch.zeros(1, 3), torch.tensor([2])
    perturbed = torch.tensor([[-1.0, -2.0, 0.0]])
    loss = smooth_adversarial_comp_sum_loss(clean, perturbed, target, nu=3.0)
    assert loss.item() == pytest.approx(math.log(3) + 3 * math.sqrt(5))


@pytest.mark.parametrize("filling", [1e30, torch.inf, torch.nan])
def test_adversarial_of_ignored_positions(filling: float) -> None:
    tensors = adversarial()
    ignored = tensors["target"] == -100
    few = {name: tensor[~ignored] for name, tensor in tensors.items()}
    for name in ("input", "adversarial_input"):
        tensors[name][ignored] = filling
        tensors[name].requires_grad_()
    for reduction in ("sum", "mean"):
        loss = smooth_adversarial_comp_sum_loss(**tensors, reduction=reduction)
        expected = smooth_adversarial_comp_sum_loss(**few, reduction=reduction)
        torch.testing.assert_close(loss, expected)
        for gradient in torch.autograd.grad(loss, [tensors["input"], tensors["adversarial_input"]]):
            assert not gradient[ignored].any()
            assert gradient[~ignored].any()
    losses = smooth_adversarial_comp_sum_loss(**tensors, reduction="none")
    assert not losses[ignored].any()
    nothing = tensors | {"target": torch.full((13,), -100)}
    assert smooth_adversarial_comp_sum_loss(**nothing).isnan()
    assert smooth_adversarial_comp_sum_loss(**nothing, reduction="sum") == 0


def test_adversarial_layouts() -> None:
    input, target = class_index(3, 2, 5).values()
    moved = input + torch.randn(3, 7, 2, 5).double()
    flat, flat_moved = (logits.movedim(1, -1).flatten(0, -2) for logits in (input, moved))
    cubic = smooth_adversarial_comp_sum_loss(input, moved, target, reduction="none")
    rows = smooth_adversarial_comp_sum_loss(flat, flat_moved, target.flatten(), reduction="none")
    torch.testing.assert_close(cubic.flatten(), rows)
    single = smooth_adversarial_comp_sum_loss(
        flat[0], flat_moved[0], target.flatten()[0], reduction="none"
    )
    torch.testing.assert_close(single, rows[0])


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_adversarial_far_logits(dtype: torch.dtype) -> None:
    size = torch.tensor(1e4, dtype=dtype).item()
    tensors = {
        "input": torch.tensor([[size, -size, 0.0]], dtype=dtype),
        "adversarial_input": torch.tensor([[-size, size, 0.0]], dtype=dtype),
        "target": torch.tensor([1]),
    }
    actual = smooth_adversarial_comp_sum_loss(**tensors)
    exact = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    truth = adversarial_definition(**exact)
    composition = truth.float() if dtype == torch.float64 else truth.to(dtype)
    assert_exact(actual, composition, truth.to(dtype).double(), dtype)


@pytest.mark.untyped
def test_bad_adversarial_targets() -> None:
    input, target = torch.zeros(2, 3), torch.tensor([0, 3])
    with pytest.raises(IndexError, match="smooth_adversarial_comp_sum_loss: target must lie in"):
        smooth_adversarial_comp_sum_loss(input, input, target)
    unread = torch.func.vmap(
        lambda target: smooth_adversarial_comp_sum_loss(input, input, target, reduction="none")
    )(target[None])[0]
    assert unread.isnan().tolist() == [False, True]


@pytest.mark.parametrize("nll", [0.5, 2.0, 8.0, 20.0])
def test_gradients_of_unlikely_targets_are_exact(nll: float) -> None:
    """The value is near its bound, where its last digits say nothing about the slope."""
    input = torch.tensor([[-nll, 0.0]], requires_grad=True)
    (actual,) = torch.autograd.grad(comp_sum_loss(input, torch.tensor([0]), tau=1.5), input)
    # The derivative of (1 - (1 + u)**-0.5) / 0.5 for u = exp(nll).
    slope = math.exp(nll) * (1 + math.exp(nll)) ** -1.5
    torch.testing.assert_close(actual, torch.tensor([[-slope, slope]]), rtol=1e-6, atol=0)
