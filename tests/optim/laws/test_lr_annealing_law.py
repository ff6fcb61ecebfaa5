"""Loss curves from schedules, against loops and scipy's least squares."""

import builtins
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import least_squares
from torch import Tensor

from tilework.optim import LRAnnealingLaw, fit_lr_annealing_law, lr_annealing_areas

import samples
from calls import Call, draw
from helpers import FLOATING, dtype_name

RATES = st.lists(st.floats(0, 1), min_size=1, max_size=40).filter(lambda lrs: lrs[0] > 0)


def momenta(lrs: list[float], decay: float, warmup_steps: int) -> list[float]:
    found = [0.0]
    for i in range(2, len(lrs) + 1):
        momentum = decay * found[-1] + lrs[i - 2] - lrs[i - 1]
        found.append(0.0 if i <= warmup_steps else momentum)
    return found


@given(RATES, st.sampled_from([0.0, 0.5, 0.999, 1.0]), st.integers(0, 45))
def test_areas_equal_loops(lrs: list[float], decay: float, warmup_steps: int) -> None:
    forward, annealing = lr_annealing_areas(lrs, decay=decay, warmup_steps=warmup_steps)
    assert forward.dtype == annealing.dtype == torch.float64
    drops = momenta(lrs, decay, warmup_steps)
    steps = range(1, len(lrs) + 1)
    assert forward.tolist() == pytest.approx([math.fsum(lrs[:s]) for s in steps])
    assert annealing.tolist() == pytest.approx([math.fsum(drops[:s]) for s in steps], abs=1e-12)


@given(RATES, st.floats(0, 1), st.integers(0, 1))
def test_annealing_equals_the_double_sum(lrs: list[float], decay: float, warmup: int) -> None:
    _, annealing = lr_annealing_areas(lrs, decay=decay, warmup_steps=warmup)
    expected = math.fsum(
        (lrs[k - 2] - lrs[k - 1]) * decay ** (i - k)
        for i in range(1, len(lrs) + 1)
        for k in range(2, i + 1)
    )
    assert annealing[-1].item() == pytest.approx(expected, abs=1e-12)


def test_areas_of_a_long_run() -> None:
    lrs = torch.rand(3000, dtype=torch.float64)
    _, annealing = lr_annealing_areas(lrs, warmup_steps=100)
    expected = np.cumsum(momenta(lrs.tolist(), 0.999, 100))
    np.testing.assert_allclose(annealing.numpy(), expected, rtol=1e-11, atol=1e-11)


def test_areas_of_a_constant_rate() -> None:
    forward, annealing = lr_annealing_areas([0.25] * 4, decay=0.9)
    assert forward.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert annealing.tolist() == [0.0] * 4
    # The rise of a warm-up does not count, and the first drop is that after its last step.
    assert lr_annealing_areas([1, 2, 4, 3], warmup_steps=3)[1].tolist() == [0, 0, 0, 1]
    assert lr_annealing_areas([1, 2, 4, 4], warmup_steps=2)[1].tolist()[2:] != [0, 0]


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
def test_layouts_and_dtypes(dtype: torch.dtype) -> None:
    lrs = (torch.rand(14) + 0.1).to(dtype)[::2]
    before = lrs.clone()
    areas = lr_annealing_areas(lrs, decay=0.9)
    for actual, expected in zip(areas, lr_annealing_areas(lrs.tolist(), decay=0.9), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert torch.equal(lrs, before)
    one = lr_annealing_areas(lrs[:1])
    assert [area.tolist() for area in one] == [[lrs[0].item()], [0.0]]


def test_prediction() -> None:
    law = LRAnnealingLaw(2.0, 0.7, 0.4, 0.3, decay=0.8)
    lrs = [0.2, 0.4, 0.4, 0.1]
    actual = law.predict(lrs, warmup_steps=2)
    assert actual.dtype == torch.float64
    expected = [
        2 + 0.7 * forward**-0.4 - 0.3 * annealing
        for forward, annealing in zip([0.2, 0.6, 1.0, 1.1], [0, 0, 0, 0.3], strict=True)
    ]
    assert actual.tolist() == pytest.approx(expected)


@pytest.mark.untyped
def test_transforms() -> None:
    law = LRAnnealingLaw(2.0, 0.7, 0.4, 0.3, decay=0.8)

    def predict(lrs: Tensor) -> Tensor:
        return law.predict(lrs, warmup_steps=2)

    lrs = (torch.rand(7, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(predict, lrs)
    assert torch.autograd.gradgradcheck(predict, lrs)
    compiled = torch.compile(predict, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(lrs), predict(lrs))
    batch = torch.stack([lrs, lrs.flip(0)])
    expected = torch.stack([predict(lrs) for lrs in batch])
    torch.testing.assert_close(torch.func.vmap(predict)(batch), expected)


def test_wrong_rates_that_are_not_read_show() -> None:
    areas = torch.func.vmap(lr_annealing_areas)(torch.tensor([[1.0, -1, 1]]))
    for area in areas:
        assert area[0].isnan().tolist() == [False, True, True]


def schedules() -> list[Tensor]:
    """A cosine and a plateau with a linear end, both after a warm-up of 100 steps."""
    rise = torch.arange(1, 101) / 100
    part = torch.linspace(0, 1, 1900)
    cosine = 0.55 + 0.45 * (math.pi * part).cos()
    plateau = (5 * (1 - part)).clamp(max=1)
    return [2e-3 * torch.cat([rise, cosine]), 1e-3 * torch.cat([rise, plateau])]


def observe(law: LRAnnealingLaw, lrs: Tensor, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    steps = torch.arange(150, len(lrs) + 1, 50)
    losses = law.predict(lrs, warmup_steps=100)[steps - 1]
    losses = losses * (noise * torch.randn(len(steps), dtype=torch.float64)).exp()
    return lrs, steps, losses


LAWS = (
    LRAnnealingLaw(2.2, 0.5, 0.45, 0.8),
    LRAnnealingLaw(0.4, 4.0, 0.08, 0.5),
    LRAnnealingLaw(1.5, 1.0, 1.2, 0.3, decay=0.99),
)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_fit_finds_a_law(law: LRAnnealingLaw) -> None:
    """From one run without noise, for another one."""
    seen, other = schedules()
    found = fit_lr_annealing_law([observe(law, seen)], decay=law.decay, warmup_steps=100)
    assert found.decay == law.decay
    actual, expected = (one.predict(other, warmup_steps=100) for one in (found, law))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    for name in ("loss_floor", "scale", "exponent", "gain"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-4)


@pytest.mark.parametrize("delta", [1e-3, 1e-2])
@pytest.mark.parametrize("noise", [1e-3, 1e-2])
def test_fit_equals_scipys(noise: float, delta: float) -> None:
    """With outliers; scipy's is the best of those from several exponents."""
    curves = [observe(LAWS[0], lrs, noise) for lrs in schedules()]
    for _, _, losses in curves:
        losses[::7] *= 1.2
    found = fit_lr_annealing_law(curves, warmup_steps=100, delta=delta)
    parts = []
    for lrs, steps, losses in curves:
        areas = lr_annealing_areas(lrs, warmup_steps=100)
        parts.append([*(area[steps - 1].numpy() for area in areas), losses.numpy()])
    forward, annealing, losses = (np.concatenate(part) for part in zip(*parts, strict=True))

    def errors(law: Any) -> Any:
        predictions = law[0] + law[1] * forward ** -law[2] - law[3] * annealing
        return np.log(np.maximum(predictions, 1e-9)) - np.log(losses)

    def objective(law: Any) -> float:
        sizes = np.abs(errors(law))
        return float(np.where(sizes < delta, sizes**2 / 2, delta * (sizes - delta / 2)).sum())

    fits = [
        least_squares(
            errors,
            [losses.min(), 0.5, exponent, 0.0],
            loss="huber",
            f_scale=delta,
            x_scale="jac",
            xtol=1e-12,
            ftol=1e-12,
            gtol=1e-12,
        )
        for exponent in (0.2, 0.5)
    ]
    theirs = min(fit.cost for fit in fits)
    law = [found.loss_floor, found.scale, found.exponent, found.gain]
    ours = objective(law)
    assert ours <= theirs * (1 + 1e-6)
    for i in range(4):  # a minimum, also where scipy stops early
        for factor in (1 - 1e-4, 1 + 1e-4):
            moved = law.copy()
            moved[i] *= factor
            assert objective(moved) > ours


def test_outliers_hardly_move_the_fit() -> None:
    law, (lrs, other) = LAWS[0], schedules()
    lrs, steps, losses = observe(law, lrs)
    losses[9::5] *= 1.5
    found = fit_lr_annealing_law([(lrs, steps, losses)], warmup_steps=100)
    actual, expected = (one.predict(other, warmup_steps=100)[200:] for one in (found, law))
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=0)


def test_fit_of_what_says_little() -> None:
    law = LRAnnealingLaw(2.0, 0.5, 0.5, 0.8)
    lrs, steps = [1e-3] * 50, [1, 5, 20, 50]
    losses = law.predict(lrs)[torch.tensor(steps) - 1]
    found = fit_lr_annealing_law([(lrs, steps[:3], losses[:3]), (lrs, steps[3:], losses[3:])])
    assert found.gain == 0
    torch.testing.assert_close(found.predict(lrs), law.predict(lrs))
    for losses in ([2.0] * 4, [1e-6, 1.0, 1.0, 1e6], [1.0, 2.0, 3.0, 4.0], [1e3, 1e-3, 1e3, 1e-3]):
        lrs = torch.linspace(1, 0.1, 50, dtype=torch.float64)
        found = fit_lr_annealing_law([(lrs, steps, losses)])
        predicted = found.predict(lrs)[torch.tensor(steps) - 1]
        assert (predicted > 0).all()
    torch.testing.assert_close(
        fit_lr_annealing_law([(lrs, steps, [2.0] * 4)]).predict(lrs),
        torch.full((50,), 2.0, dtype=torch.float64),
    )


def test_units_do_not_matter() -> None:
    """Of the learning rates, and of the losses, which as logarithms are all shifted."""
    lrs, steps, losses = observe(LAWS[0], schedules()[0], 1e-3)
    plain = fit_lr_annealing_law([(lrs, steps, losses)], warmup_steps=100)
    scaled = fit_lr_annealing_law([(1024 * lrs, steps, 8 * losses)], warmup_steps=100)
    torch.testing.assert_close(
        scaled.predict(1024 * lrs, warmup_steps=100),
        8 * plain.predict(lrs, warmup_steps=100),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.untyped
def test_scalars_and_arrays_of_numpy() -> None:
    law = LRAnnealingLaw(np.float64(2), np.float32(1), np.float64(0.5), np.int64(1))
    lrs = np.linspace(1, 0.1, 20)[::-1]
    losses = law.predict(lrs, warmup_steps=np.int64(2))
    steps = np.arange(2, 20)
    found = fit_lr_annealing_law([(lrs, steps, losses.numpy()[1:19])], warmup_steps=2)
    torch.testing.assert_close(found.predict(lrs, warmup_steps=2), losses)


def test_law_is_frozen() -> None:
    law = LAWS[0]
    assert law == LRAnnealingLaw(2.2, 0.5, 0.45, 0.8, 0.999)
    with pytest.raises(AttributeError):
        law.gain = 1.0  # type: ignore[misc]


@pytest.mark.untyped
def test_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    law, lrs = LAWS[0], schedules()[0]
    steps, losses = [200, 900], torch.tensor([3.0, 2.5])
    axes = law.plot(lrs, warmup_steps=100, observed=(steps, losses))
    try:
        lines = {line.get_label(): line.get_xydata() for line in axes.lines}
        predicted = law.predict(lrs, warmup_steps=100)[100:]
        np.testing.assert_allclose(lines["predicted"][:, 1], predicted.numpy())
        np.testing.assert_allclose(lines["predicted"][:, 0], np.arange(101, 2001))
        np.testing.assert_allclose(lines["observed"], [[200, 3.0], [900, 2.5]])
        behind = axes.figure.axes[-1]
        np.testing.assert_allclose(behind.lines[0].get_ydata(), lrs.numpy())
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
        assert behind.get_ylabel() == "learning rate"
        fresh = pyplot.subplots()[1]
        assert law.plot(lrs.requires_grad_(), ax=fresh) is fresh
        assert len(fresh.lines) == 1
        with pytest.raises(
            ValueError, match=r"LRAnnealingLaw\.plot: steps of observed must be fro"
        ):
            law.plot(lrs, observed=([2001], [1.0]))
    finally:
        pyplot.close("all")
    load = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("no module matplotlib")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"LRAnnealingLaw\.plot: needs matplotlib: pip install"):
        law.plot(lrs)


LRS: list[tuple[str, type[Exception], Any]] = [
    ("must be of shape", ValueError, []),
    ("must be of shape", ValueError, torch.ones(())),
    ("must be of shape", ValueError, torch.ones(2, 2)),
    ("must be finite and at least 0 everywhere, got -1.0", ValueError, [1.0, -1.0]),
    ("must be finite and at least 0 everywhere, got nan", ValueError, [1.0, math.nan]),
    ("must be finite and at least 0 everywhere, got inf", ValueError, [1.0, math.inf]),
    ("must be above 0 at the first step, got 0.0", ValueError, [0.0, 1.0]),
    ("must be a floating-point tensor", TypeError, torch.ones(2).int()),
    ("must be a number, got 'a'", TypeError, ["a"]),
    ("must be a tensor or an iterable of numbers, got 1.0", TypeError, 1.0),
]


@pytest.mark.untyped
@pytest.mark.parametrize(("message", "error", "lrs"), LRS, ids=str)
def test_bad_rates(message: str, error: type[Exception], lrs: Any) -> None:
    with pytest.raises(error, match=f"^lr_annealing_areas: lrs {message}"):
        lr_annealing_areas(lrs)
    with pytest.raises(error, match=rf"^LRAnnealingLaw\.predict: lrs {message}"):
        LAWS[0].predict(lrs)
    with pytest.raises(error, match=rf"^fit_lr_annealing_law: lrs of curves\[0\] {message}"):
        fit_lr_annealing_law([(lrs, [1] * 4, [1.0] * 4)])


CURVES: list[tuple[str, type[Exception], Any]] = [
    (r"steps of curves\[0\] must be from 1 to 3, got 0", ValueError, ([1.0] * 3, [0, 1], [1, 2])),
    (r"steps of curves\[0\] must be from 1 to 3, got 4", ValueError, ([1.0] * 3, [4, 1], [1, 2])),
    (r"steps of curves\[0\] must be of shape \(3,\)", ValueError, ([1.0], [1, 1], [1, 2, 3])),
    (r"steps of curves\[0\] must be an int", TypeError, ([1.0], [1.0], [1.0])),
    (r"steps of curves\[0\] must be ints or int64", TypeError, ([1.0], torch.ones(1), [1.0])),
    (r"steps of curves\[0\] must be ints or int64", TypeError, ([1.0], 1, [1.0])),
    (r"losses of curves\[0\] must be finite and above 0", ValueError, ([1.0], [1], [0.0])),
    (r"losses of curves\[0\] must be finite and above 0", ValueError, ([1.0], [1], [math.nan])),
    (r"losses of curves\[0\] must be of shape", ValueError, ([1.0], [], [])),
    (r"curves\[0\] must be a triple of learning rates, steps", TypeError, ([1.0], [1])),
    (r"curves\[0\] must be a triple of learning rates, steps", TypeError, None),
    ("curves must be of 4 observations or more in all", ValueError, ([1.0], [1] * 3, [1.0] * 3)),
]


@pytest.mark.untyped
@pytest.mark.parametrize(("message", "error", "curve"), CURVES, ids=str)
def test_bad_curves(message: str, error: type[Exception], curve: Any) -> None:
    with pytest.raises(error, match=f"^fit_lr_annealing_law: {message}"):
        fit_lr_annealing_law([curve])


@pytest.mark.untyped
def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"^fit_lr_annealing_law: curves must be of 4 observation"):
        fit_lr_annealing_law([])
    curves = [([1.0] * 4, [1, 2, 3, 4], [1.0] * 4)]
    for decay in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"^lr_annealing_areas: decay must be a number from 0"):
            lr_annealing_areas([1.0], decay=decay)
        with pytest.raises(
            ValueError, match=r"^fit_lr_annealing_law: decay must be a number from 0"
        ):
            fit_lr_annealing_law(curves, decay=decay)
        with pytest.raises(
            ValueError, match=r"^LRAnnealingLaw: decay must be a number from 0 to 1"
        ):
            LRAnnealingLaw(1, 1, 1, 1, decay)
    for error, steps in ((ValueError, -1), (TypeError, 1.0)):
        with pytest.raises(error, match=r"^lr_annealing_areas: warmup_steps must be an int"):
            lr_annealing_areas([1.0], warmup_steps=steps)  # type: ignore[arg-type]
        with pytest.raises(error, match=r"^fit_lr_annealing_law: warmup_steps must be an int"):
            fit_lr_annealing_law(curves, warmup_steps=steps)  # type: ignore[arg-type]
        with pytest.raises(error, match=r"^LRAnnealingLaw\.predict: warmup_steps must be an int"):
            LAWS[0].predict([1.0], warmup_steps=steps)  # type: ignore[arg-type]
    for delta in (0, math.nan):
        with pytest.raises(ValueError, match=r"^fit_lr_annealing_law: delta must be a finite numb"):
            fit_lr_annealing_law(curves, delta=delta)
    for place, name in enumerate(("loss_floor", "scale", "exponent", "gain")):
        fields: list[Any] = [1.0] * 4
        fields[place] = math.inf
        with pytest.raises(ValueError, match=f"^LRAnnealingLaw: {name} must be a finite number"):
            LRAnnealingLaw(*fields)
        fields[place] = "1"
        with pytest.raises(TypeError, match=f"^LRAnnealingLaw: {name} must be a number"):
            LRAnnealingLaw(*fields)


@samples.of(Call)
def calls() -> list[Call]:
    return [
        Call(
            lr_annealing_areas,
            lambda: {"lrs": draw(7).abs() + 0.1},
            differentiable=("lrs",),
            options=({"decay": 0.9, "warmup_steps": 2},),
        ),
    ]
