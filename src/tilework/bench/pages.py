"""Recorded results in Markdown, also inside a page: numbers are never copied by hand.

A page names what belongs into it, relative to itself, and :func:`refresh` fills that in::

    <!-- table results/machine.jsonl forward -->
    <!-- end -->

``table`` gives one table for each case and dtype whose name contains the rest of the line,
``summary`` one for each case, with its dtypes side by side, ``strongest`` a line for each case and
dtype, with Tilework's default and the fastest peer; ``scaling`` the fitted exponents.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tilework.bench import report, results, scaling
from tilework.bench.results import OK, Row

BLOCK = re.compile(
    r"(^<!-- (table|summary|strongest|scaling) (\S+) ?(.*?) ?-->\n)(.*?)(^<!-- end -->)",
    re.DOTALL | re.MULTILINE,
)


def refresh(page: Path) -> str:
    """The text of a page with its blocks filled in anew.

    Raises:
        ValueError: The page cannot be read, has no block, or names results that cannot be read.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{page} cannot be read: {error}") from error

    def fill(block: re.Match[str]) -> str:
        begin, kind, file, pattern, _, end = block.groups()
        rows = results.read(page.parent / file)
        body = exponents(rows) if kind == "scaling" else KINDS[kind](rows, pattern)
        return f"{begin}\n{body}\n{end}"

    text, count = BLOCK.subn(fill, text)
    if count == 0:
        raise ValueError(
            f"{page} has no block to fill in, such as <!-- table FILE --> <!-- end -->"
        )
    return text


def tables(rows: Sequence[Row], pattern: str = "") -> str:
    """One table for each case and dtype whose name contains the pattern."""
    groups = _cases(rows, pattern, lambda row: f"{_case(row)}, {row.dtype}")
    return "\n".join(_table(name, group) for name, group in groups)


def summary(rows: Sequence[Row], pattern: str = "") -> str:
    """One table for each case: its candidates by time, memory and first error in each dtype."""
    return "\n".join(_summary(name, group) for name, group in _cases(rows, pattern, _case))


def strongest(rows: Sequence[Row], pattern: str = "") -> str:
    """Tilework's default beside the fastest peer, a line for each case and dtype."""
    groups = _cases(rows, pattern, lambda row: f"{_case(row)}, {row.dtype}")
    lines, measured = [], list[Row]()
    for name, group in groups:
        timed = _measured(group)
        ours = [row for row in timed if row.default]
        peers = sorted((row for row in timed if row.peer), key=lambda row: row.median or 0.0)
        cells = [_time(ours[:1], timed), _time(peers[:1], timed)]
        lines.append([name, *cells])
        measured += timed
    table = _markdown(["", "Tilework's default", "the strongest peer"], lines)
    return "\n".join([f"{_place(groups[0][1][0])}.", "", *table, *_disturbed(measured)])


def _time(rows: Sequence[Row], among: Sequence[Row]) -> str:
    if not rows:
        return "none was measured"
    (row,) = rows
    best = min(other.median or 0.0 for other in among if other.peer or other.default)
    text = report.duration(row.median or 0.0)
    name = row.candidate.removeprefix("tilework").strip()
    return (f"**{text}**" if row.median == best else text) + (f" ({name})" if name else "")


def _summary(title: str, rows: Sequence[Row]) -> str:
    measured = _measured(rows)
    found = {(row.candidate, row.dtype): row for row in measured}
    header, columns = ["candidate"], list[Callable[[str], str]]()

    def column(dtype: str, value: Callable[[Row], float | None], text: Callable[..., str]) -> None:
        values = [value(row) for row in measured if row.dtype == dtype]
        least = min((one for one in values if one is not None), default=None)

        def cell(candidate: str) -> str:
            row = found.get((candidate, dtype))
            one = None if row is None else value(row)
            if one is None:
                return ""
            return f"**{text(one)}**" if one == least else text(one)

        columns.append(cell)

    error = next((name for row in measured for name in row.errors), "nothing")
    for dtype in dict.fromkeys(row.dtype for row in measured):
        header += [dtype, "memory", f"error of {error}"]
        column(dtype, lambda row: row.median, report.duration)
        column(dtype, lambda row: row.peak_bytes, report.size)
        column(dtype, partial(_error_of, error), _error)
    ours = {row.candidate: not row.peer for row in measured}
    lines = [
        [
            (f"**{name}**" if ours[name] else name) + _default(name, measured),
            *(cell(name) for cell in columns),
        ]
        for name in ours
    ]
    return "\n".join(
        [f"**{title}** ({_place(rows[0])})", "", *_markdown(header, lines), *_disturbed(measured)]
    )


def _error_of(name: str, row: Row) -> float | None:
    return row.errors.get(name)


def _default(candidate: str, rows: Sequence[Row]) -> str:
    """Whether Tilework takes it by itself, in all dtypes or in some."""
    own = {row.dtype: row.default for row in rows if row.candidate == candidate}
    some = [dtype for dtype, default in own.items() if default]
    if not some:
        return ""
    return " (default)" if len(some) == len(own) else f" (default in {', '.join(some)})"


KINDS = {"table": tables, "summary": summary, "strongest": strongest}


def _case(row: Row) -> str:
    return f"{row.suite}: {row.case}"


def _cases(
    rows: Sequence[Row], pattern: str, name: Callable[[Row], str]
) -> list[tuple[str, list[Row]]]:
    """The rows whose case and dtype contain the pattern, by name and place."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if pattern in f"{_case(row)}, {row.dtype}":
            groups.setdefault((name(row), _place(row)), []).append(row)
    if not groups:
        raise ValueError(f"no case matches {pattern!r}")
    return [(title, group) for (title, _), group in groups.items()]


def _measured(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.status == OK and row.median is not None]


def _disturbed(rows: Sequence[Row]) -> list[str]:
    disturbed = results.disturbance(rows)
    return [f"**{disturbed}**  "] if disturbed else []


def _place(row: Row) -> str:
    threads = f", {row.threads} threads" if row.threads else ""
    place = f"{row.device_name}{threads}, torch {row.versions.get('torch')}, {row.commit or ''}"
    return place.rstrip(", ")


def _table(title: str, rows: Sequence[Row]) -> str:
    measured = _measured(rows)
    names = list(dict.fromkeys(name for row in measured for name in row.errors))
    lines = [f"**{title}** ({_place(rows[0])})", ""]
    lines += _markdown(
        [
            "candidate",
            "median",
            "quartiles",
            "memory",
            "of limit",
            *(f"error of {n}" for n in names),
        ],
        [
            [
                f"**{row.candidate}**" if not row.peer else row.candidate,
                report.duration(row.median or 0.0),
                f"{report.duration(row.q1 or 0.0)} – {report.duration(row.q3 or 0.0)}",
                "" if row.peak_bytes is None else report.size(row.peak_bytes),
                "" if row.fraction_of_limit is None else f"{row.fraction_of_limit:.0%}",
                *(_error(row.errors.get(name)) for name in names),
            ]
            for row in measured
        ],
    )
    rest = [row for row in rows if row.status != OK]
    lines += [f"{row.candidate}: {row.status}, {row.reason}  " for row in rest]
    return "\n".join([*lines, *_disturbed(measured), ""])


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def exponents(rows: Sequence[Row]) -> str:
    """The fitted exponents beside the expected ones."""
    found = scaling.fits(rows)
    if not found:
        raise ValueError("no series of growing work was measured over two orders of magnitude")
    lines = [_place(found[0].rows[0]) + ".", ""]
    lines += _markdown(
        ["operator", "grows", "work", "time", "fitted exponent", "expected"],
        [
            [
                fit.name,
                f"{fit.over} {fit.sizes[0]} – {fit.sizes[-1]}",
                f"× {(fit.rows[-1].flops or 0) / (fit.rows[0].flops or 1):.0f}",
                " – ".join(report.duration(fit.rows[end].median or 0.0) for end in (0, -1)),
                f"{fit.exponent:.2f} ± {fit.error:.2f}",
                f"{fit.expected:.2f}",
            ]
            for fit in found
        ],
    )
    for fit in found:
        disturbed = results.disturbance(fit.rows)
        lines += [f"{fit.name} over {fit.over}: **{disturbed}**  "] if disturbed else []
    return "\n".join(lines)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]
