import dataclasses

import numpy as np
import pytest
from bench import tiny_suite
from bench.test_results import ROW
from scipy import stats

from tilework.bench import scaling, suites
from tilework.bench.results import Row


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "discover", lambda: {"tiny_suite": tiny_suite.SUITE})


def grown(power: float = 1.5, points: int = 8) -> list[Row]:
    cases = tiny_suite.SUITE.growth[0].cases[:points]
    return [
        dataclasses.replace(
            ROW,
            suite="tiny_suite",
            case=case.name,
            kind="square",
            sizes=dict(case.sizes),
            default=True,
            flops=10**6 * case.sizes["n"] ** 2,
            median=2e-6 * case.sizes["n"] ** power,
            q1=1e-6 * case.sizes["n"] ** power,
            q3=3e-6 * case.sizes["n"] ** power,
        )
        for case in cases
    ]


def test_the_line_is_that_of_a_regression_in_logarithms() -> None:
    generator = np.random.default_rng(0)
    sizes = np.array([1.0, 3, 9, 20, 77, 300])
    costs = 5 * sizes**1.3 * np.exp(0.1 * generator.standard_normal(6))
    expected = stats.linregress(np.log(sizes), np.log(costs))
    exponent, factor, error = scaling.line(sizes, costs)
    assert exponent == pytest.approx(expected.slope)
    assert factor == pytest.approx(np.exp(expected.intercept))
    assert error == pytest.approx(expected.stderr)


def test_a_series_has_its_fitted_and_its_expected_exponent() -> None:
    rows = grown()
    (fit,) = scaling.fits(reversed(rows))
    assert (fit.over, fit.sizes) == ("n", [8, 16, 32, 64, 128, 256, 512, 1024])
    assert fit.rows == tuple(rows)
    assert fit.exponent == pytest.approx(1.5)
    assert fit.error == pytest.approx(0, abs=1e-6)
    assert fit.scale == pytest.approx(2e-6)
    assert fit.expected == pytest.approx(2)
    assert fit.name == "tiny_suite, square"
    half = [dataclasses.replace(row, dtype="bfloat16") for row in rows]
    assert [one.name for one in scaling.fits(rows + half)] == [
        "tiny_suite, square",
        "tiny_suite, square, bfloat16",
    ]


def test_what_is_not_the_default_or_was_not_measured_is_no_point() -> None:
    rows = grown()
    slow = [dataclasses.replace(row, candidate="other", default=False, median=9.0) for row in rows]
    failed = dataclasses.replace(rows[0], candidate="x", status="failed", median=None)
    (fit,) = scaling.fits([*rows, *slow, failed])
    assert fit.exponent == pytest.approx(1.5)


def test_two_orders_of_magnitude_and_five_points_are_needed() -> None:
    assert scaling.fits(grown(points=4)) == []
    few = [row for row in grown() if row.sizes["n"] in (8, 64, 512, 1024)]
    assert scaling.fits(few) == []
    narrow = [dataclasses.replace(row, flops=row.sizes["n"]) for row in grown(points=7)]
    assert narrow[-1].flops < 100 * narrow[0].flops
    assert scaling.fits(narrow) == []


def test_devices_are_not_mixed() -> None:
    elsewhere = [dataclasses.replace(row, device_name="a slide rule") for row in grown()[:4]]
    assert scaling.fits(elsewhere + grown()[4:]) == []
    elsewhere = [dataclasses.replace(row, device_name="a slide rule") for row in grown(3.0)]
    assert [fit.exponent for fit in scaling.fits(grown() + elsewhere)] == pytest.approx([1.5, 3])
