"""Rows as a table for people."""

from collections.abc import Callable, Iterable, Sequence

from rich.table import Table

from tilework.bench import results
from tilework.bench.results import OK, Row
from tilework.bench.suites import Suite

_PREFIXES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def duration(seconds: float) -> str:
    """Three digits and a unit.

    Example:
        >>> from tilework.bench.report import duration
        >>> duration(0.00123)
        '1.23 ms'
    """
    scale, unit = next(
        ((scale, unit) for scale, unit in _PREFIXES if seconds >= scale), _PREFIXES[-1]
    )
    return f"{seconds / scale:.3g} {unit}"


def size(count: int) -> str:
    """Bytes in MB, as everywhere in the results: 10⁶ bytes."""
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:.2g} MB"


def table(rows: Sequence[Row], composition: str) -> Table:
    """The rows of one case in one dtype.

    Args:
        rows: One for each candidate.
        composition: The candidate that the others' times are compared with.
    """
    first = rows[0]
    result = Table(
        title=f"{first.suite}: {first.case} {first.dtype}\n{first.device_name}"
        + (f", {first.threads} threads" if first.threads else ""),
        title_justify="left",
    )
    baseline = next((row.median for row in rows if row.candidate == composition), None)
    outcomes = [name for row in rows for name in row.errors]
    facts = [name for row in rows for name in row.extra]
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("candidate", lambda row: row.candidate + (" (default)" if row.default else "")),
        ("median", _median),
        ("quartiles", _quartiles),
        (f"× {composition}", lambda row: _ratio(row, baseline)),
        ("memory", lambda row: "" if row.peak_bytes is None else size(row.peak_bytes)),
        ("of limit", _fraction),
        *((f"error of {name}", _error(name)) for name in dict.fromkeys(outcomes)),
        *((name, _fact(name)) for name in dict.fromkeys(facts)),
    ]
    result.add_column(columns[0][0], min_width=16)
    for name, _ in columns[1:]:
        result.add_column(name, justify="right")
    for row in rows:
        style = "dim" if row.status != OK else "" if row.peer else "bold"
        result.add_row(*(cell(row) for _, cell in columns), style=style)
    reasons = [f"{row.candidate}: {row.status}, {row.reason}" for row in rows if row.reason]
    notes = [f"{row.candidate}: {note}" for row in rows for note in row.notes]
    disturbed = results.disturbance(rows)
    notes += [disturbed] if disturbed else []
    result.caption = "\n".join(reasons + notes) or None
    result.caption_justify = "left"
    return result


def _median(row: Row) -> str:
    return row.status if row.median is None else duration(row.median)


def _quartiles(row: Row) -> str:
    if row.q1 is None or row.q3 is None:
        return ""
    return f"{duration(row.q1)} – {duration(row.q3)}"


def _ratio(row: Row, baseline: float | None) -> str:
    return f"{row.median / baseline:.2f}" if row.median and baseline else ""


def _fraction(row: Row) -> str:
    return "" if row.fraction_of_limit is None else f"{row.fraction_of_limit:.0%}"


def _error(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        error = row.errors.get(name)
        return "" if error is None else f"{error:.1e}"

    return cell


def _fact(name: str) -> Callable[[Row], str]:
    return lambda row: str(row.extra.get(name, ""))


def suites_table(suites: Iterable[Suite], device: str) -> Table:
    """What can be measured: the suites with their cases and candidates."""
    result = Table("suite", "case", "dtypes", "candidates", show_lines=True)
    for suite in suites:
        cases = suite.cases(device)
        result.add_row(
            f"[bold]{suite.name}[/bold]\n{suite.about}",
            "\n".join(case.name + (" (--quick)" if case.quick else "") for case in cases),
            "\n".join(", ".join(case.dtypes) for case in cases),
            "\n".join(one.name for one in suite.candidates),
        )
    return result
