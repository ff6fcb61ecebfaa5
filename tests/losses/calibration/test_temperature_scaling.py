"""Temperature scaling, against scipy's minimizer."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from tilework.losses import TemperatureScaling

from helpers import FLOATING, dtype_name


def problem(rows: int = 100, classes: int = 5, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits whose classes were drawn at the temperature ``scale``."""
    logits = scale * torch.randn(rows, classes, dtype=torch.float64)
    target = torch.multinomial((logits / scale).softmax(1), 1).squeeze(1)
    return logits, target


def by_scipy(input: Tensor, target: Tensor) -> float:
    result = minimize_scalar(
        lambda log: F.cross_entropy(input.double() / math.exp(log), target).item(),
        bracket=(-1.0, 2.0),
        options={"xtol": 1e-12},
    )
    return math.exp(result.x)


@given(st.integers(20, 100), st.integers(2, 7), st.floats(0.2, 10), st.integers(0, 10**6))
def test_equals_scipys(rows: int, classes: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    input, target = problem(rows, classes, scale)
    temperature = TemperatureScaling().fit(input, target).temperature
    expected = min(max(by_scipy(input, target), 0.01), 100.0)
    # A minimum is flat: scipy finds it to the square root of the rounding of its values.
    assert temperature.item() == pytest.approx(expected, rel=1e-6)
    before = F.cross_entropy(input, target)
    assert F.cross_entropy(input / temperature, target) <= before + 1e-12


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_the_derivative_vanishes(scale: float) -> None:
    """To the relative accuracy of 1e-8: the derivative changes its sign within it."""
    input, target = problem(63, 4, scale)
    temperature = TemperatureScaling().fit(input, target).temperature.item()

    def derivative(temperature: float) -> float:
        inverse = torch.tensor(1 / temperature, dtype=torch.float64, requires_grad=True)
        F.cross_entropy(input * inverse, target).backward()
        assert inverse.grad is not None
        return inverse.grad.item()

    assert derivative(temperature * (1 - 1e-8)) > 0 > derivative(temperature * (1 + 1e-8))


def test_scales_with_the_logits() -> None:
    input, target = problem()
    first = TemperatureScaling().fit(input, target).temperature
    for factor in (0.1, 7.0):
        scaled = TemperatureScaling().fit(factor * input, target).temperature
        torch.testing.assert_close(scaled, factor * first, rtol=1e-8, atol=0)


def test_bounds() -> None:
    """Rows that are all right want none, those that are all wrong want an infinite one."""
    input = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    right, wrong = torch.tensor([0, 1]), torch.tensor([1, 0])
    bounds: dict[str, Any] = {"min_temperature": 0.5, "max_temperature": 4.0}
    assert TemperatureScaling(**bounds).fit(input, right).temperature == 0.5
    assert TemperatureScaling(**bounds).fit(input, wrong).temperature == 4.0
    assert TemperatureScaling().fit(input, right).temperature.item() == pytest.approx(0.01)
    constant = torch.ones(2, 3)
    assert TemperatureScaling().fit(constant, right).temperature == 1
    assert TemperatureScaling(min_temperature=2.0).fit(constant, right).temperature == 2


def test_ignored_rows_and_absent_classes_do_not_count() -> None:
    input, target = problem()
    expected = TemperatureScaling().fit(input[:60], target[:60]).temperature
    marked = torch.cat([target[:60], torch.full((40,), -100)])
    poisoned = torch.cat([input[:60], torch.full((40, 5), torch.nan).double()])
    assert TemperatureScaling().fit(poisoned, marked).temperature == expected
    absent = torch.cat([input[:60], torch.full((60, 1), -torch.inf)], 1)
    torch.testing.assert_close(
        TemperatureScaling().fit(absent, target[:60]).temperature, expected, rtol=1e-12, atol=0
    )
    other = TemperatureScaling().fit(input, target, ignore_index=2).temperature
    kept = target != 2
    assert other == TemperatureScaling().fit(input[kept], target[kept]).temperature


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_dtypes(dtype: torch.dtype) -> None:
    input, target = problem()
    input = input.to(dtype).requires_grad_()
    before = input.detach().clone()
    scaling = TemperatureScaling().fit(input, target)
    assert torch.equal(input, before)
    assert scaling.temperature.dtype == torch.float64
    expected = TemperatureScaling().fit(input.detach().double(), target).temperature
    assert scaling.temperature == expected
    scaled = scaling(input)
    assert scaled.dtype == dtype
    exact = input.detach().double() / expected
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(scaled.double(), exact, rtol=eps, atol=0)
    (gradient,) = torch.autograd.grad(scaled.sum(), input)
    torch.testing.assert_close(gradient.double(), (1 / expected).expand(100, 5), rtol=eps, atol=0)
    assert torch.equal(scaled.argmax(1), input.argmax(1))


def test_before_fitting_and_after_loading() -> None:
    input, target = problem()
    scaling = TemperatureScaling()
    assert torch.equal(scaling(input), input)
    assert scaling(torch.zeros(0, 3)).shape == (0, 3)
    assert scaling.fit(input, target) is scaling
    other = TemperatureScaling()
    other.load_state_dict(scaling.state_dict())
    assert list(scaling.state_dict()) == ["temperature"]
    assert torch.equal(other(input), scaling(input))
    assert (
        repr(TemperatureScaling(max_temperature=5.0)) == "TemperatureScaling(max_temperature=5.0)"
    )


def test_extreme_logits() -> None:
    target = torch.tensor([0, 0, 0, 1])
    input = torch.tensor([[1e4, 0.0]] * 4)
    scaling = TemperatureScaling(max_temperature=1e6).fit(input, target)
    assert scaling.temperature.item() == pytest.approx(1e4 / math.log(3), rel=1e-8)
    hot = TemperatureScaling(min_temperature=1e-9).fit(input * 1e-8, target)
    assert hot.temperature.item() == pytest.approx(1e-4 / math.log(3), rel=1e-6)


def test_takes_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    softmax = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda *args: passes.append(1) or softmax(*args))
    for scale in (0.02, 1.0, 50.0):
        passes.clear()
        TemperatureScaling().fit(*problem(1000, 50, scale))
        assert 3 < len(passes) < 20


@pytest.mark.untyped
def test_compiles() -> None:
    scaling = TemperatureScaling().fit(*problem())
    compiled = torch.compile(scaling, fullgraph=True, dynamic=True, backend="aot_eager")
    input = torch.randn(7, 3)
    torch.testing.assert_close(compiled(input), scaling(input))
    torch.testing.assert_close(torch.func.vmap(scaling)(input), scaling(input))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("message", "error", "change"),
    [
        (r"input must be of shape \(N, C\)", ValueError, {"input": torch.zeros(4)}),
        (r"input must be of shape \(N, C\)", ValueError, {"input": torch.zeros(4, 3, 2)}),
        ("input must be a floating-point", TypeError, {"input": torch.zeros(4, 3).int()}),
        (r"target must be of shape \(4,\)", ValueError, {"target": torch.tensor([1, 2])}),
        ("target must be int64", TypeError, {"target": torch.zeros(4).int()}),
        ("target must keep at least one row", ValueError, {"target": torch.full((4,), -100)}),
        ("input must be finite", ValueError, {"input": torch.full((4, 3), torch.nan)}),
        ("input must be finite", ValueError, {"input": torch.full((4, 3), torch.inf)}),
        (
            "input must be finite",
            ValueError,
            {"input": torch.tensor([[-torch.inf, 0.0, 1.0]]).expand(4, 3)},
        ),
        ("target must lie in", IndexError, {"target": torch.full((4,), 3)}),
        ("ignore_index must be an int", TypeError, {"ignore_index": 1.0}),
    ],
)
def test_bad_input(message: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments = {"input": torch.randn(4, 3), "target": torch.zeros(4, dtype=torch.int64)} | change
    scaling = TemperatureScaling()
    with pytest.raises(error, match=rf"TemperatureScaling\.fit: {message}"):
        scaling.fit(**arguments)
    assert scaling.temperature == 1


@pytest.mark.untyped
def test_bad_options() -> None:
    for options in ({"min_temperature": 0.0}, {"min_temperature": -1.0}):
        with pytest.raises(ValueError, match="TemperatureScaling: min_temperature must be a"):
            TemperatureScaling(**options)
    with pytest.raises(ValueError, match="TemperatureScaling: max_temperature must be a finite"):
        TemperatureScaling(max_temperature=math.inf)
    with pytest.raises(ValueError, match="max_temperature must be above min_temperature=2"):
        TemperatureScaling(min_temperature=2.0, max_temperature=2.0)
    with pytest.raises(TypeError, match="TemperatureScaling: input must be a floating-point"):
        TemperatureScaling()(torch.zeros(3).int())
