"""Recorded results in Markdown, also inside a page: numbers are never copied by hand.

A page names what belongs into it, relative to itself, and :func:`refresh` fills that in::

    <!-- table results/machine.jsonl forward -->
    <!-- end -->

``table`` gives one table for each case whose name contains the rest of the line, ``scaling`` the
fitted exponents.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from tilework.bench import report, results, scaling
from tilework.bench.results import OK, Row

BLOCK = re.compile(
    r"(^<!-- (table|scaling) (\S+) ?(.*?) ?-->\n)(.*?)(^<!-- end -->)", re.DOTALL | re.MULTILINE
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
        body = exponents(rows) if kind == "scaling" else tables(rows, pattern)
        return f"{begin}\n{body}\n{end}"

    text, count = BLOCK.subn(fill, text)
    if count == 0:
        raise ValueError(
            f"{page} has no block to fill in, such as <!-- table FILE --> <!-- end -->"
        )
    return text


def tables(rows: Sequence[Row], pattern: str = "") -> str:
    """One table for each case and dtype whose name contains the pattern."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        name = f"{row.suite}: {row.case}, {row.dtype}"
        if pattern in name:
            cases.setdefault((name, _place(row)), []).append(row)
    if not cases:
        raise ValueError(f"no case matches {pattern!r}")
    return "\n".join(_table(name, place, group) for (name, place), group in cases.items())


def _place(row: Row) -> str:
    threads = f", {row.threads} threads" if row.threads else ""
    return f"{row.device_name}{threads}, torch {row.versions.get('torch')}, {row.commit or ''}"


def _table(title: str, place: str, rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row.status == OK and row.median is not None]
    names = list(dict.fromkeys(name for row in measured for name in row.errors))
    lines = [f"**{title}** ({place.rstrip(', ')})", ""]
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
    disturbed = results.disturbance(measured)
    lines += [f"**{disturbed}**  "] if disturbed else []
    return "\n".join([*lines, ""])


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
