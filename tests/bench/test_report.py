import dataclasses
import io

import pytest
from bench.test_results import ROW
from rich.console import Console

from tilework.bench import pages, report
from tilework.bench.suites import discover


def text(table: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_units() -> None:
    assert [report.duration(s) for s in (75.0, 1.5, 1.0, 0.0123, 4.5e-5, 6e-9, 5e-11, 0.0)] == [
        "75 s",
        "1.5 s",
        "1 s",
        "12.3 ms",
        "45 µs",
        "6 ns",
        "0.05 ns",
        "0 ns",
    ]
    sizes = [report.size(b) for b in (1_500_000, 9_940_000, 10_000_000, 11_500_001, 1_234_499_999)]
    assert sizes == ["1.5 MB", "9.9 MB", "10 MB", "12 MB", "1,234 MB"]


def test_a_table_has_times_ratios_errors_facts_and_reasons() -> None:
    ours = dataclasses.replace(
        ROW,
        default=True,
        peak_bytes=int(129e6),
        fraction_of_limit=0.61,
        errors={"loss": 2.5e-7},
        extra={"tiles kept": 0.49},
    )
    eager = dataclasses.replace(ROW, candidate="torch eager", peer=True, median=2.0)
    missing = dataclasses.replace(
        eager, candidate="quack", status="missing", reason="no such luck", median=None, q1=None
    )
    shown = text(report.table([ours, eager, missing], "torch eager"))
    line = next(line for line in shown.splitlines() if "tilework s" in line)
    assert shown.count("candidate") == 1
    assert line.split("│")[1].startswith(" tilework")  # names to the left, numbers to the right
    assert [cell.startswith("  ") for cell in line.split("│")[2:4]] == [True, False]
    for cell in ("(default)", "1 s", "980 ms – 1.02 s", "0.50", "129 MB", "61%", "2.5e-07", "0.49"):
        assert cell in line
    assert "tiles kept" in shown
    assert "error of loss" in shown
    assert "quack: missing, no such luck" in shown


def test_an_unbounded_error_is_shown_as_null() -> None:
    row = dataclasses.replace(
        ROW, errors={"loss": None}, status="refused", reason="nan", median=None
    )
    assert "refused" in text(report.table([row], "torch eager"))


def test_suites_are_listed_with_cases_and_peers() -> None:
    shown = text(report.suites_table(discover().values(), "cpu"))
    assert "forward+backward N=2048 D=768 V=50304" in shown
    cases = [case for suite in discover().values() for case in suite.cases("cpu")]
    assert shown.count("(--quick)") == sum(case.quick for case in cases) < len(cases)
    assert "liger-kernel" in shown


@pytest.mark.parametrize("place", [0, 1])
def test_a_disturbed_measurement_is_marked_whichever_row_it_is(place: int) -> None:
    for busy, marked in ((None, False), (0.02, False), (1.2, True)):
        rows = [dataclasses.replace(ROW, others_cpus=0.0, candidate=name) for name in "ab"]
        rows[place].others_cpus = busy
        for shown in (text(report.table(rows, "")), pages.tables(rows)):
            assert ("not sound: other processes kept 1.2 CPUs busy" in shown) == marked
