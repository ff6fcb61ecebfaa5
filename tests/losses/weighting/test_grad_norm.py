"""GradNorm, against gradients by hand and torch's Adam."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tilework.losses import GradNorm, grad_norm_loss

import samples
from losses.samples import Arguments, Loss


def definition(
    task_weights: Tensor, grad_norms: Tensor, loss_ratios: Tensor, *, alpha: float = 1.5
) -> Tensor:
    tasks = len(task_weights)
    with torch.no_grad():
        mean = sum(task_weights[i] * grad_norms[i] for i in range(tasks)) / tasks
        rates = loss_ratios / (sum(loss_ratios[i] for i in range(tasks)) / tasks)
        targets = [mean * rates[i].pow(alpha) for i in range(tasks)]
    terms = [(task_weights[i] * grad_norms[i] - targets[i]).abs() for i in range(tasks)]
    return torch.stack(terms).sum()


def draw(tasks: int = 5) -> Arguments:
    names = ("task_weights", "grad_norms", "loss_ratios")
    return {name: torch.rand(tasks, dtype=torch.float64) + 0.1 for name in names}


@samples.of(Loss)
def table() -> list[Loss]:
    return [
        Loss(
            grad_norm_loss,
            definition,
            None,
            draw,
            options=({}, {"alpha": 0.0}, {"alpha": 0.4}),
            differentiable=("task_weights",),
            batched=(),
            class_index=False,
            surrogate=True,
            accepts={name: torch.ones(3) for name in draw()},
            refuses=(
                (r"grad_norms must be of shape \(3,\)", ValueError, {"grad_norms": torch.ones(4)}),
                (
                    r"loss_ratios must be of shape \(3,\)",
                    ValueError,
                    {"loss_ratios": torch.ones(4)},
                ),
                *(
                    (
                        "task_weights must be of shape",
                        ValueError,
                        {"task_weights": torch.ones(shape)},
                    )
                    for shape in ((1,), (), (2, 2))
                ),
                ("alpha must be a finite number of at least 0", ValueError, {"alpha": -0.1}),
            ),
        )
    ]


def test_gradient_in_closed_form() -> None:
    tensors = draw(7)
    for tensor in tensors.values():
        tensor.requires_grad_()
    grad_norm_loss(**tensors, alpha=0.5).backward()
    assert tensors["grad_norms"].grad is None
    assert tensors["loss_ratios"].grad is None
    weights, norms, ratios = (tensor.detach() for tensor in tensors.values())
    targets = (weights * norms).mean() * (ratios / ratios.mean()).sqrt()
    gradient = tensors["task_weights"].grad
    torch.testing.assert_close(gradient, torch.sign(weights * norms - targets) * norms)


def test_at_the_target_the_gradient_is_0() -> None:
    weights = torch.ones(3, requires_grad=True)
    loss = grad_norm_loss(weights, torch.full((3,), 2.0), torch.ones(3))
    assert loss == 0
    assert torch.autograd.grad(loss, weights)[0].tolist() == [0, 0, 0]


def test_without_alpha_all_targets_are_equal() -> None:
    tensors = draw(6)
    weighted = tensors["task_weights"] * tensors["grad_norms"]
    expected = (weighted - weighted.mean()).abs().sum()
    torch.testing.assert_close(grad_norm_loss(**tensors, alpha=0.0), expected)


def test_nan_shows_in_every_argument() -> None:
    for name in draw():
        tensors = draw()
        tensors[name][1] = torch.nan
        assert grad_norm_loss(**tensors).isnan()


class Tasks:
    """Three tasks with heads on two shared parameters; one uses only one of them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.shared = [nn.Parameter(normal(4, 3)), nn.Parameter(normal(4))]
        self.heads = [nn.Parameter(normal(4)) for _ in range(3)]
        self.inputs = normal(20, 6, 3)

    def losses(self, step: int) -> list[Tensor]:
        hidden = (self.inputs[step] @ self.shared[0].T + self.shared[1]).tanh()
        outputs = [hidden @ self.heads[0], 5 * hidden @ self.heads[1]]
        return [
            (outputs[0] - 1).square().mean(),
            outputs[1].square().mean() + 1,
            (self.shared[1] * self.heads[2]).square().sum(),
        ]


def by_hand(tasks: Tasks, steps: int, alpha: float, lr: float) -> list[tuple[float, Tensor]]:
    """What each call returns, and the weights after it; with torch's optimizer."""
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weights], lr=lr)
    initial: list[float] = []
    results = []
    for step in range(steps):
        losses = tasks.losses(step)
        initial = initial or [loss.item() for loss in losses]
        result = sum(w * loss.item() for w, loss in zip(weights.tolist(), losses, strict=True))
        norms, ratios = [], []
        for loss, first in zip(losses, initial, strict=True):
            square = 0.0
            for parameter in tasks.shared:
                (gradient,) = torch.autograd.grad(
                    loss, parameter, retain_graph=True, allow_unused=True
                )
                square += 0.0 if gradient is None else float(gradient.double().square().sum())
            norms.append(square**0.5)
            ratios.append(loss.item() / first)
        mean = sum(w * norm for w, norm in zip(weights.tolist(), norms, strict=True)) / 3
        weights.grad = torch.zeros_like(weights)
        for i in range(3):
            target = mean * (ratios[i] / (sum(ratios) / 3)) ** alpha
            gap = weights[i].item() * norms[i] - target
            weights.grad[i] = norms[i] * ((gap > 0) - (gap < 0))
        adam.step()
        with torch.no_grad():
            weights.clamp_(min=1e-3).mul_(3 / weights.sum())
        results.append((result, weights.detach().clone()))
    return results


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.3, "lr": 0.2}, {"alpha": 0.0, "lr": 2.0}], ids=str
)
@pytest.mark.parametrize("stacked", [False, True])
def test_equals_torchs_adam(options: dict[str, float], stacked: bool) -> None:
    tasks = Tasks(torch.float64)
    criterion = GradNorm(3, **options).double()
    expected = by_hand(Tasks(torch.float64), 20, **({"alpha": 1.5, "lr": 0.025} | options))
    for step in range(20):
        losses: Any = tasks.losses(step)
        result = criterion(torch.stack(losses) if stacked else losses, iter(tasks.shared))
        assert result.item() == pytest.approx(expected[step][0], rel=1e-9)
        torch.testing.assert_close(criterion.weights, expected[step][1], rtol=1e-10, atol=0)
        assert criterion.weights.sum().item() == pytest.approx(3)
        assert (criterion.weights > 0).all()
    assert all(parameter.grad is None for parameter in [*tasks.shared, *tasks.heads])


def test_returns_the_sum_with_the_old_weights() -> None:
    tasks = Tasks()
    criterion = GradNorm(3, lr=0.5)
    for step in range(3):
        old = criterion.weights.clone()
        losses = tasks.losses(step)
        criterion(losses, tasks.shared).backward()
        assert not torch.equal(criterion.weights, old)
        expected = torch.autograd.grad(
            sum(w * loss for w, loss in zip(old, tasks.losses(step), strict=True)), tasks.shared
        )
        for parameter, gradient in zip(tasks.shared, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
            parameter.grad = None


def test_identical_tasks_keep_equal_weights_and_a_strong_one_loses() -> None:
    shared = torch.ones(3, requires_grad=True)
    criterion = GradNorm(2)
    for _ in range(5):
        loss = shared.square().sum()
        criterion([loss, loss], shared)
        assert criterion.weights.tolist() == [1, 1]
    criterion = GradNorm(2)
    criterion([shared.sum(), 7 * shared.sum()], shared)
    assert criterion.weights[1] < 1 < criterion.weights[0]


def test_evaluation_and_no_grad_only_sum() -> None:
    tasks = Tasks()
    criterion = GradNorm(3, initial_losses=[1.0, 2.0, 3.0])
    criterion(tasks.losses(0), tasks.shared)
    before = copy.deepcopy(criterion.state_dict())
    expected = sum(w * loss for w, loss in zip(criterion.weights, tasks.losses(1), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(criterion(tasks.losses(1), tasks.shared), expected)
    criterion.eval()
    torch.testing.assert_close(criterion(tasks.losses(1), tasks.shared), expected)
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name])


def test_resumes_bitwise() -> None:
    tasks = Tasks()
    first = GradNorm(3, lr=0.1)
    for step in range(4):
        first(tasks.losses(step), tasks.shared)
    second = nn.Sequential(GradNorm(3, lr=0.1))
    second.load_state_dict(nn.Sequential(first).state_dict())
    assert set(first.state_dict()) == {"weights", "exp_avg", "exp_avg_sq", "step", "initial_losses"}
    for step in range(4, 8):
        losses = tasks.losses(step)
        assert torch.equal(first(losses, tasks.shared), second[0](losses, tasks.shared))
        for name, value in first.state_dict().items():
            assert torch.equal(value, second[0].state_dict()[name])
    fresh = GradNorm(3)
    assert "initial_losses" not in fresh.state_dict()
    first.load_state_dict(fresh.state_dict())
    assert first.initial_losses is None
    first(tasks.losses(5), tasks.shared)
    torch.testing.assert_close(first.initial_losses, torch.stack(tasks.losses(5)).detach())


def test_initial_losses() -> None:
    tasks = Tasks()
    given = GradNorm(3, initial_losses=[1.0, 2.0, 3.0])
    given(tasks.losses(0), tasks.shared)
    assert given.initial_losses is not None
    assert given.initial_losses.tolist() == [1, 2, 3]
    found = GradNorm(3)
    found(tasks.losses(0), tasks.shared)
    first = found.initial_losses
    assert first is not None
    torch.testing.assert_close(first, torch.stack(tasks.losses(0)).detach())
    found(tasks.losses(1), tasks.shared)
    assert found.initial_losses is first


def test_measures_from_the_first_losses_that_progress_can_be_measured_from() -> None:
    """Of 0 or what is not finite, no loss is a part: the weights wait for others."""
    shared = torch.ones(2, requires_grad=True)

    def losses(*scales: float) -> list[Tensor]:
        return [scale * shared.sum() for scale in scales]

    criterion = GradNorm(2)
    for scales in ((0.0, 1.0), (1.0, torch.nan), (torch.inf, 1.0), (-1.0, 1.0)):
        criterion(losses(*scales), shared)
        assert criterion.weights.tolist() == [1, 1]
        assert criterion.step == 0
    criterion(losses(2.0, 6.0), shared)
    criterion(losses(1.0, 6.0), shared)
    twin = GradNorm(2, initial_losses=[4.0, 12.0])
    twin(losses(2.0, 6.0), shared)
    twin(losses(1.0, 6.0), shared)
    for name in ("weights", "exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(getattr(criterion, name), getattr(twin, name))
    assert criterion.step == 2
    criterion = GradNorm(2)
    with torch.inference_mode():
        criterion(losses(2.0, 6.0), shared)
    criterion(losses(1.0, 6.0), shared)
    assert criterion.initial_losses.tolist() == [4, 12]
    for value in (0.0, -1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"^GradNorm: initial_losses\[1\] must be a finite"):
            GradNorm(2, initial_losses=[1.0, value])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    tasks = Tasks(dtype)
    criterion = GradNorm(3)
    result = criterion(tasks.losses(0), tasks.shared)
    assert result.dtype == dtype
    assert criterion.weights.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        assert criterion(tasks.losses(1), tasks.shared).dtype == torch.float32


@pytest.mark.untyped
def test_bad_module_input() -> None:
    with pytest.raises(ValueError, match="GradNorm: num_tasks must be an int of at least 2"):
        GradNorm(1)
    with pytest.raises(TypeError, match="GradNorm: num_tasks must be an int"):
        GradNorm(2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="GradNorm: alpha must be a finite number of at least 0"):
        GradNorm(2, alpha=-1.0)
    with pytest.raises(ValueError, match="GradNorm: lr must be a finite number above 0"):
        GradNorm(2, lr=0.0)
    with pytest.raises(ValueError, match=r"GradNorm: initial_losses must be of shape \(2,\)"):
        GradNorm(2, initial_losses=[1.0])
    with pytest.raises(TypeError, match="unexpected keyword"):
        GradNorm(2, learning_rate=0.1)  # type: ignore[call-arg]
    tasks = Tasks()
    losses = tasks.losses(0)
    criterion = GradNorm(3)
    with pytest.raises(ValueError, match=r"GradNorm: losses must be 3 scalars or .*, got 2"):
        criterion(losses[:2], tasks.shared)
    with pytest.raises(ValueError, match=r"GradNorm: losses must be of shape \(3,\)"):
        criterion(torch.stack(losses[:2]), tasks.shared)
    with pytest.raises(ValueError, match=r"GradNorm: losses\[1\] must be of shape \(\)"):
        criterion([losses[0], losses[1][None], losses[2]], tasks.shared)
    with pytest.raises(TypeError, match=r"GradNorm: losses\[2\] must be a floating-point tensor"):
        criterion([losses[0], losses[1], 1.0], tasks.shared)
    with pytest.raises(ValueError, match=r"GradNorm: losses\[0\] must have a graph"):
        criterion([losses[0].detach(), losses[1], losses[2]], tasks.shared)
    for shared in ([], [tasks.inputs], [*tasks.shared, torch.ones(3)]):
        with pytest.raises(ValueError, match="GradNorm: shared_parameters must be at least one"):
            criterion(losses, shared)
