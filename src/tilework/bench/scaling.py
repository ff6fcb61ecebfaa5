"""How time grows with work: exponents fitted to the series that suites declare as their growth."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tilework.bench import suites
from tilework.bench.results import OK, Row

FEWEST = 5  # points
TWO_ORDERS = 100  # the work of the largest case by that of the smallest


@dataclass(frozen=True)
class Fit:
    """A series of one operator over one size, and the straight line through it in logarithms.

    Attributes:
        over: The size that grows.
        rows: Of the default implementation, smallest first.
        exponent: The slope of the time.
        error: Its standard error.
        scale: The time that the line gives at a size of 1.
        expected: The slope of the operations that the definition needs, over the same sizes.
    """

    over: str
    rows: tuple[Row, ...]
    exponent: float
    error: float
    scale: float
    expected: float

    @property
    def sizes(self) -> list[int]:
        """The size in each row."""
        return [row.sizes[self.over] for row in self.rows]

    @property
    def name(self) -> str:
        """The work, and the dtype where it is not float32."""
        first = self.rows[0]
        return f"{first.suite}, {first.kind}" + (
            "" if first.dtype == "float32" else f", {first.dtype}"
        )


def line(sizes: Iterable[float], costs: Iterable[float]) -> tuple[float, float, float]:
    """Exponent and factor of the power law closest to the costs, and the exponent's error.

    Example:
        >>> from tilework.bench.scaling import line
        >>> exponent, factor, error = line([1.0, 2.0, 4.0, 8.0], [3.0, 12.0, 48.0, 192.0])
        >>> round(exponent, 6), round(factor, 6), round(error, 6)
        (2.0, 3.0, 0.0)
    """
    x, y = (np.log(np.asarray(list(values), dtype=np.float64)) for values in (sizes, costs))
    (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), float(np.exp(intercept)), float(np.sqrt(max(covariance[0, 0], 0.0)))


def fits(rows: Iterable[Row]) -> list[Fit]:
    """The series of which enough was measured, those of one device each."""
    default = {
        (row.device_name, row.dtype, row.suite, row.case): row
        for row in rows
        if row.default and row.status == OK and row.median is not None
    }
    places = list(dict.fromkeys(key[:2] for key in default))
    found = []
    for name, suite in suites.discover().items():
        for growth in suite.growth:
            for place in places:
                keys = [(*place, name, case.name) for case in growth.cases]
                fit = _fit(growth.over, [default[key] for key in keys if key in default])
                if fit is not None:
                    found.append(fit)
    return found


def _fit(over: str, rows: list[Row]) -> Fit | None:
    work = [float(row.flops or 0) for row in rows]
    if len(rows) < FEWEST or work[-1] < TWO_ORDERS * work[0]:
        return None
    sizes = [float(row.sizes[over]) for row in rows]
    exponent, scale, error = line(sizes, [row.median or 0.0 for row in rows])
    return Fit(over, tuple(rows), exponent, error, scale, line(sizes, work)[0])
