import dataclasses
import json
import math
from pathlib import Path

import pytest

from tilework.bench import results
from tilework.bench.results import Row

ROW = Row(
    suite="s",
    case="work n=1",
    kind="work",
    sizes={"n": 1},
    dtype="float32",
    device="cpu",
    device_name="an abacus",
    candidate="tilework s",
    peer=False,
    median=1.0,
    q1=0.98,
    q3=1.02,
    runs=5,
)


def timed(median: float, spread: float = 0.04) -> Row:
    return dataclasses.replace(ROW, median=median, q1=median - spread / 2, q3=median + spread / 2)


def write(path: Path, *rows: Row) -> Path:
    log = results.Log(path)
    for row in rows:
        log.write(row)
    log.close()
    return path


def test_rows_survive_the_file(tmp_path: Path) -> None:
    other = dataclasses.replace(
        ROW, candidate="peer", status=results.MISSING, reason="it is not there"
    )
    assert results.read(write(tmp_path / "new folder" / "r.jsonl", ROW, other)) == [ROW, other]


def test_each_row_is_on_disk_before_the_next(tmp_path: Path) -> None:
    log = results.Log(tmp_path / "r.jsonl")
    for count in (1, 2):
        log.write(dataclasses.replace(ROW, candidate=str(count)))
        assert len(results.read(tmp_path / "r.jsonl")) == count
    log.close()


def test_a_file_is_appended_to_and_the_last_measurement_counts(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, timed(1.0))
    write(path, timed(2.0))
    assert len(path.read_text().splitlines()) == 2
    assert results.read(path) == [timed(2.0)]


def test_an_error_that_is_not_finite_is_null_in_strict_json(tmp_path: Path) -> None:
    row = dataclasses.replace(ROW, errors={"a": math.nan, "b": math.inf, "c": 0.5})
    record = json.loads(row.to_json(), parse_constant=pytest.fail)
    assert record["errors"] == {"a": None, "b": None, "c": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "holds no rows"),
        ("not json\n", "line 1 must be a row .* got no JSON"),
        ("[]\n", "got schema None"),
        ('{"schema": 2}\n', "line 1 must be a row that .* schema 1, got schema 2"),
        ('{"schema": 1, "suite": "s"}\n', "line 1 must be"),
        (ROW.to_json() + "\n" + ROW.to_json()[:50], "line 2 must be"),
    ],
)
def test_an_unreadable_file_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "r.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        results.read(path)


@pytest.mark.parametrize(
    ("old", "new", "worse"),
    [
        (timed(1.0), timed(1.2), True),
        (timed(1.0, 0.0), timed(1.04, 0.0), False),  # below the tolerance
        (timed(1.0, 0.0), timed(1.06, 0.0), True),
        (timed(1.0, 0.15), timed(1.2, 0.1), False),  # within the spreads
        (timed(1.0), timed(0.5), False),
    ],
)
def test_a_regression_is_a_slowdown_beyond_the_spread(old: Row, new: Row, worse: bool) -> None:
    found, unmatched = results.regressions([old], [new])
    assert bool(found) == worse
    assert unmatched == 0
    if worse:
        assert "s work n=1 float32, tilework s: 1 s -> " in found[0]


def test_a_row_that_is_no_longer_ok_is_a_regression() -> None:
    refused = dataclasses.replace(ROW, status=results.REFUSED, reason="wrong", median=None)
    assert "now refused: wrong" in results.regressions([ROW], [refused])[0][0]
    assert results.regressions([refused], [refused]) == ([], 0)


def test_other_devices_and_cases_are_not_compared() -> None:
    elsewhere = dataclasses.replace(timed(9.0), device_name="a slide rule")
    assert results.regressions([ROW], [elsewhere]) == ([], 1)


def test_the_commit_is_that_of_this_checkout_or_none() -> None:
    commit = results.commit()
    assert commit is None or set(commit.removesuffix("-dirty")) <= set("0123456789abcdef")


def test_versions_name_what_was_measured() -> None:
    assert set(results.versions()) == {"python", "torch", "triton", "tilework"}
    assert results.version("no-such-package") is None
