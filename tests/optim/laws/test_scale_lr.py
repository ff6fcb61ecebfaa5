"""Learning rates and batch sizes, against random matrices and steps on quadratics."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilework.optim import batch_hessian_edge, max_lr_rmt, polyak_hyperparameters, scale_lr

BATCHES = st.integers(1, 10**6)


@given(
    st.floats(1e-4, 10),
    BATCHES,
    BATCHES,
    BATCHES,
    st.sampled_from(["linear", "sqrt"]),
    st.one_of(st.none(), BATCHES),
)
def test_scale_lr_composes(
    lr: float, first: int, second: int, third: int, rule: str, limit: int | None
) -> None:
    def scaled(lr: float, before: int, after: int) -> float:
        return scale_lr(lr, before, after, rule=rule, max_batch_size=limit)

    assert scaled(lr, first, first) == lr
    in_two = scaled(scaled(lr, first, second), second, third)
    assert in_two == pytest.approx(scaled(lr, first, third), rel=1e-12)


def test_scale_lr() -> None:
    assert scale_lr(0.1, 32, 128) == pytest.approx(0.4)
    assert scale_lr(0.1, 32, 8) == pytest.approx(0.025)
    assert scale_lr(0.1, 32, 128, rule="sqrt") == pytest.approx(0.2)
    assert scale_lr(0.1, 32, 128, max_batch_size=64) == pytest.approx(0.2)
    assert scale_lr(0.1, 128, 32, max_batch_size=64) == pytest.approx(0.05)
    assert scale_lr(0.1, 128, 512, max_batch_size=64) == 0.1
    assert scale_lr(0, 1, 2) == 0


@pytest.mark.parametrize("eigenvalue", [-4.0, 1.0, 3.0, 8.0])
def test_edge_equals_that_of_random_matrices(eigenvalue: float) -> None:
    """A symmetric matrix of noise about one of rank one."""
    size, variance, batch_size = 800, 0.3, 60
    noise = torch.randn(size, size, dtype=torch.float64) * math.sqrt(variance / batch_size)
    matrix = noise.triu() + noise.triu(1).T
    direction = torch.nn.functional.normalize(torch.randn(size, dtype=torch.float64), dim=0)
    matrix += eigenvalue * torch.outer(direction, direction)
    largest = torch.linalg.eigvalsh(matrix)[-1].item()
    edge = batch_hessian_edge(eigenvalue, variance, size, batch_size)
    # The bulk has the radius 4; what stands out spreads as 2 * sqrt(2 / size) = 0.1 at most.
    assert largest == pytest.approx(edge, abs=0.3)


@given(st.floats(1e-3, 1e3), st.floats(0, 10), st.integers(1, 10**9), BATCHES)
def test_edge_properties(eigenvalue: float, variance: float, params: int, batch: int) -> None:
    edge = batch_hessian_edge(eigenvalue, variance, params, batch)
    assert edge >= eigenvalue
    assert batch_hessian_edge(eigenvalue, variance, params, 1e30) == pytest.approx(eigenvalue)
    assert batch_hessian_edge(eigenvalue, 0, params, batch) == eigenvalue
    assert batch_hessian_edge(eigenvalue, variance, params, 2 * batch) <= edge * (1 + 1e-15)
    rate = max_lr_rmt(eigenvalue, variance, params, batch)
    assert rate == pytest.approx(2 / edge)


@given(st.floats(0.1, 100))
def test_edge_is_continuous(noise: float) -> None:
    sides = [batch_hessian_edge(noise * (1 + side), noise**2, 1, 1) for side in (-1e-6, 0, 1e-6)]
    assert sides == pytest.approx([2 * noise] * 3, rel=1e-11)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_max_lr_is_where_steps_stop_to_converge(momentum: float) -> None:
    given = (3.0, 0.02, 500, 5)
    curvature = batch_hessian_edge(*given)
    bound = max_lr_rmt(*given, momentum=momentum)
    for part, converges in ((0.99, True), (1.01, False)):
        weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=part * bound, momentum=momentum)
        for _ in range(4000):
            weight.grad = curvature * weight.detach()
            optimizer.step()
            if abs(weight.item()) > 1e6:
                break
        assert (abs(weight.item()) < 1e-3) == converges


def test_max_lr() -> None:
    noisy = [max_lr_rmt(1.0, 1.0, 10**6, batch) for batch in (1, 4, 16)]
    assert noisy == pytest.approx([1e-3, 2e-3, 4e-3])
    assert max_lr_rmt(0.0, 0.0, 10, 1) == math.inf
    assert max_lr_rmt(-1.0, 0.0, 10, 1, momentum=0.9) == math.inf


@given(st.floats(1e-3, 1), st.floats(1, 100), st.floats(-0.02, 0.02), st.floats(-0.02, 0.02))
def test_polyak_is_best(smallest: float, ratio: float, more: float, heavier: float) -> None:
    """By how the heavy ball shrinks along the eigenvector for which it is slowest."""
    largest = ratio * smallest

    def shrinks_by(lr: float, momentum: float) -> float:
        found = []
        for curvature in (largest, smallest):
            matrix = np.array([[1 + momentum - lr * curvature, -momentum], [1, 0]])
            found.append(max(abs(np.linalg.eigvals(matrix))))
        return float(max(found))

    lr, momentum = polyak_hyperparameters(largest, smallest)
    best = shrinks_by(lr, momentum)
    # Where two eigenvalues meet they are known to half the digits.
    assert best == pytest.approx(math.sqrt(momentum), abs=1e-7)
    other = shrinks_by(lr * (1 + more), min(max(momentum + heavier, 0), 0.999))
    assert other >= best - 1e-7


def test_polyak_of_one_curvature() -> None:
    assert polyak_hyperparameters(4, 4) == (0.25, 0.0)


@pytest.mark.untyped
def test_scalars_of_numpy() -> None:
    for result in (
        scale_lr(np.float64(0.1), np.int64(2), np.int64(4)),
        batch_hessian_edge(np.float64(3), np.float64(1), np.int64(4), np.int64(2)),
        max_lr_rmt(np.float64(3), np.float64(1), np.int64(4), np.int64(2)),
        *polyak_hyperparameters(np.float64(3), np.float64(1)),
    ):
        assert type(result) is float


REFUSES: list[tuple[Any, str, type[Exception], dict[str, Any]]] = [
    (scale_lr, "base_lr must be a finite number of at least 0", ValueError, {"base_lr": -1}),
    (scale_lr, "base_lr must be a number", TypeError, {"base_lr": "1"}),
    (scale_lr, "base_batch_size must be a finite n", ValueError, {"base_batch_size": 0}),
    (scale_lr, "batch_size must be a finite number above 0", ValueError, {"batch_size": math.nan}),
    (scale_lr, "rule must be one of 'linear', 'sqrt'", ValueError, {"rule": "cube"}),
    (scale_lr, "max_batch_size must be a finite n", ValueError, {"max_batch_size": 0}),
    (batch_hessian_edge, "eigenvalue must be a finite", ValueError, {"eigenvalue": math.inf}),
    (batch_hessian_edge, "variance must be a finite number of a", ValueError, {"variance": -1e-9}),
    (batch_hessian_edge, "num_params must be a finite number ab", ValueError, {"num_params": 0}),
    (batch_hessian_edge, "batch_size must be a finite number ab", ValueError, {"batch_size": -2}),
    (max_lr_rmt, "eigenvalue must be a finite", ValueError, {"eigenvalue": math.nan}),
    (max_lr_rmt, "variance must be a finite number of a", ValueError, {"variance": -1e-9}),
    (
        max_lr_rmt,
        "momentum must be a number of at least 0 and below 1",
        ValueError,
        {"momentum": 1},
    ),
    (max_lr_rmt, "momentum must be a number of at l", ValueError, {"momentum": math.nan}),
    (polyak_hyperparameters, "largest must be a finite number", ValueError, {"largest": 0}),
    (polyak_hyperparameters, "smallest must be a finite number", ValueError, {"smallest": 0}),
    (polyak_hyperparameters, "smallest must be at most largest, 2", ValueError, {"smallest": 3}),
]
ACCEPTS: dict[Any, dict[str, Any]] = {
    scale_lr: {"base_lr": 0.1, "base_batch_size": 2, "batch_size": 3},
    batch_hessian_edge: {"eigenvalue": 1, "variance": 1, "num_params": 2, "batch_size": 3},
    max_lr_rmt: {"eigenvalue": 1, "variance": 1, "num_params": 2, "batch_size": 3},
    polyak_hyperparameters: {"largest": 2, "smallest": 1},
}


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("function", "message", "error", "change"),
    REFUSES,
    ids=lambda one: getattr(one, "__name__", None),
)
def test_bad_input(
    function: Any, message: str, error: type[Exception], change: dict[str, Any]
) -> None:
    function(**ACCEPTS[function])
    with pytest.raises(error, match=f"^{function.__name__}: {message}"):
        function(**ACCEPTS[function] | change)
