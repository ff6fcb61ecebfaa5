"""Online Platt scaling, against numpy, scipy's projection and scikit-learn's regression."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from tilework.losses import OnlinePlattScaling

KINDS = ("platt", "beta")
every_kind = pytest.mark.parametrize("kind", KINDS)
STREAMS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=30)


def features(probability: float, kind: str, eps: float = 1e-6) -> np.ndarray:
    p = min(max(probability, eps), 1 - eps)
    if kind == "platt":
        return np.array([math.log(p / (1 - p)), 1.0])
    return np.array([math.log(p), -math.log(1 - p), 1.0])


def by_numpy(
    stream: list[tuple[float, int]], kind: str, beta: float, diameter: float
) -> tuple[list[float], np.ndarray]:
    """Predictions and the last parameters, while the projection has nothing to do."""
    theta = np.array([1.0, 0.0] if kind == "platt" else [1.0, 1.0, 0.0])
    matrix = np.eye(len(theta)) / (beta * diameter) ** 2
    predictions = []
    for probability, target in stream:
        x = features(probability, kind)
        prediction = 1 / (1 + math.exp(-theta @ x))
        predictions.append(prediction)
        gradient = (prediction - target) * x
        matrix = matrix + gradient[:, None] * gradient[None]
        theta = theta - np.linalg.inv(matrix) @ gradient / beta
    return predictions, theta


@given(STREAMS, st.sampled_from(KINDS), st.sampled_from([(0.1, None), (0.5, 1.5)]))
def test_equals_numpys(
    stream: list[tuple[float, int]], kind: str, steps: tuple[float, float | None]
) -> None:
    beta, diameter = steps
    scaling = OnlinePlattScaling(kind=kind, beta=beta, diameter=diameter, radius=1e6)
    default = {"platt": 1.0, "beta": 2.0}[kind]
    expected, theta = by_numpy(stream, kind, beta, default if diameter is None else diameter)
    probabilities, targets = zip(*stream, strict=True)
    actual = scaling.transform(probabilities, targets)
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(scaling.theta.numpy(), theta, rtol=1e-7, atol=1e-7)
    assert ((actual >= 0) & (actual <= 1)).all()


@every_kind
def test_first_prediction_is_the_probability(kind: str) -> None:
    scaling = OnlinePlattScaling(kind=kind, eps=1e-3)
    for probability in (0.3, 0.5, 0.999):
        assert scaling.predict(probability) == pytest.approx(probability, rel=1e-12)
    assert scaling.predict(0.0) == pytest.approx(1e-3)
    assert scaling.predict(1.0) == pytest.approx(1 - 1e-3)


@every_kind
def test_a_prediction_does_not_know_its_outcome(kind: str) -> None:
    torch.manual_seed(0)
    values, outcomes = torch.rand(20).double(), torch.randint(2, (20,))
    expected = OnlinePlattScaling(kind=kind).transform(values, outcomes)
    for t in (0, 7, 19):
        changed = outcomes.clone()
        changed[t] = 1 - changed[t]
        actual = OnlinePlattScaling(kind=kind).transform(values, changed)
        assert torch.equal(actual[: t + 1], expected[: t + 1])
        assert t == 19 or not torch.equal(actual[t + 1 :], expected[t + 1 :])


@every_kind
def test_projection_is_the_nearest_point(kind: str) -> None:
    """With a small ball, the parameters after a step solve a constrained least-squares problem."""
    radius = {"platt": 1.1, "beta": 1.5}[kind]
    free = OnlinePlattScaling(kind=kind, diameter=20.0, radius=1e6)
    tight = OnlinePlattScaling(kind=kind, diameter=20.0, radius=radius)
    stream = [(0.9, 1), (0.6, 1), (0.2, 0), (0.3, 1), (0.7, 0)]
    projected = 0
    for probability, target in stream:
        free.load_state_dict(tight.state_dict())
        free.update(probability, target)
        tight.update(probability, target)
        assert torch.equal(tight.matrix, free.matrix)
        theta, matrix = free.theta.numpy(), free.matrix.numpy()
        if np.linalg.norm(theta) <= tight.radius:
            assert torch.equal(tight.theta, free.theta)
            continue
        projected += 1
        best = minimize(
            lambda v, theta=theta, matrix=matrix: (v - theta) @ matrix @ (v - theta),
            theta / np.linalg.norm(theta),
            jac=lambda v, theta=theta, matrix=matrix: 2 * matrix @ (v - theta),
            constraints={
                "type": "ineq",
                "fun": lambda v: radius**2 - v @ v,
                "jac": lambda v: -2 * v,
            },
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        assert tight.theta.norm().item() == pytest.approx(tight.radius, rel=1e-10)
        np.testing.assert_allclose(tight.theta.numpy(), best.x, rtol=1e-5, atol=1e-6)
    assert projected > 2


@every_kind
def test_approaches_offline_platt_scaling(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(8000, generator=generator, dtype=torch.float64)
    truth = (0.4 * logits - 0.7).sigmoid()
    outcomes = (torch.rand(8000, generator=generator, dtype=torch.float64) < truth).long()
    values = logits.sigmoid()
    actual = OnlinePlattScaling(kind=kind).transform(values, outcomes)
    inputs = np.array([features(value, kind)[:-1] for value in values.tolist()])
    offline = LogisticRegression(C=np.inf, tol=1e-10).fit(inputs, outcomes.numpy())
    best = torch.tensor(offline.predict_proba(inputs)[:, 1])

    def log_loss(predictions: torch.Tensor) -> float:
        return float(torch.nn.functional.binary_cross_entropy(predictions, outcomes.double()))

    # The regret of online Newton steps grows as the logarithm of the stream's length.
    assert log_loss(best) - 1e-9 < log_loss(actual) < log_loss(best) + 0.01
    assert log_loss(values) > log_loss(best) + 0.1


def test_resumes() -> None:
    first, second = OnlinePlattScaling(), OnlinePlattScaling()
    first.update(0.8, 0)
    second.load_state_dict(first.state_dict())
    assert list(first.state_dict()) == ["theta", "matrix"]
    first.update(0.3, True)
    second.update(0.3, 1)
    assert torch.equal(first.theta, second.theta)
    assert first.theta.dtype == first.matrix.dtype == torch.float64
    changed = OnlinePlattScaling(kind="beta", diameter=3.0, eps=1e-3)
    assert repr(changed) == "OnlinePlattScaling(kind='beta', diameter=3.0, eps=0.001)"


def test_of_nothing() -> None:
    assert OnlinePlattScaling().transform(torch.zeros(0), torch.zeros(0)).shape == (0,)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "options"),
    [
        ("kind must be one of 'platt', 'beta'", ValueError, {"kind": "isotonic"}),
        ("beta must be a finite number above 0", ValueError, {"beta": 0.0}),
        ("diameter must be a finite number above 0", ValueError, {"diameter": -1.0}),
        ("radius must be a finite number above 0", ValueError, {"radius": 0.0}),
        ("eps must be a number above 0 and below 0.5", ValueError, {"eps": 0.5}),
        ("eps must be a number above 0 and below 0.5", ValueError, {"eps": 0.0}),
        ("eps must be a number", TypeError, {"eps": "0"}),
    ],
)
def test_bad_options(message: str, error: type[Exception], options: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"OnlinePlattScaling: {message}"):
        OnlinePlattScaling(**options)


@pytest.mark.untyped
def test_bad_input() -> None:
    scaling = OnlinePlattScaling()
    name = r"OnlinePlattScaling\."
    for probability in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"{name}predict: probability must be a number from 0"):
            scaling.predict(probability)
        with pytest.raises(ValueError, match=f"{name}update: probability must be a number from 0"):
            scaling.update(probability, 1)
    with pytest.raises(TypeError, match=f"{name}predict: probability must be a number"):
        scaling.predict("0.5")  # type: ignore[arg-type]
    for target in (2, 0.5, -1):
        with pytest.raises(ValueError, match=f"{name}update: target must be 0 or 1"):
            scaling.update(0.5, target)  # type: ignore[arg-type]
    assert scaling.theta.tolist() == [1, 0]
    with pytest.raises(ValueError, match=rf"{name}transform: probabilities must be of shape \(n\)"):
        scaling.transform(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=rf"{name}transform: targets must be of shape \(2,\)"):
        scaling.transform([0.5, 0.5], [1])
