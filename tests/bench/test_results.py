import dataclasses
import json
import math
import re
import subprocess
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


def test_each_row_is_on_disk_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(results.os, "fsync", synced.append)
    log = results.Log(tmp_path / "r.jsonl")
    for count in (1, 2):
        log.write(dataclasses.replace(ROW, candidate=str(count)))
        assert len(results.read(tmp_path / "r.jsonl")) == len(synced) == count
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


def test_the_commit_of_changed_sources_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "src" / "tilework"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    monkeypatch.setattr(results.tilework, "__file__", str(package / "__init__.py"))
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    assert results.commit.__wrapped__() is None

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    git("tag", "-m", "v", "v1")  # the name is that of the commit, whatever tags there are
    clean = results.commit.__wrapped__()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (package / "__init__.py").write_text("x = 2\n")
    assert results.commit.__wrapped__() == f"{clean}-dirty"
    git("commit", "-am", "two")
    assert "dirty" not in results.commit.__wrapped__()
    # Installed in a folder of another checkout.
    elsewhere = tmp_path / "lib" / "tilework"
    elsewhere.mkdir(parents=True)
    monkeypatch.setattr(results.tilework, "__file__", str(elsewhere / "__init__.py"))
    assert results.commit.__wrapped__() is None


def test_a_regression_of_a_disturbed_measurement_says_so() -> None:
    for old, new in ((1.5, 0.0), (0.0, 1.5), (0.0, 0.0)):
        (line,), _ = results.regressions(
            [dataclasses.replace(timed(1.0), others_cpus=old)],
            [dataclasses.replace(timed(2.0), others_cpus=new)],
        )
        assert ("not sound: other processes kept 1.5" in line) == bool(old or new)


def test_versions_name_what_was_measured() -> None:
    assert set(results.versions()) == {"python", "torch", "triton", "tilework", "sources"}
    assert results.version("no-such-package") is None


def test_sources_have_a_digest_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("__init__.py", "deep/one.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(results.tilework, "__file__", str(tmp_path / "__init__.py"))
    first = results.sources.__wrapped__()
    assert results.sources.__wrapped__() == first
    (tmp_path / "deep" / "one.py").write_text("x = 2\n")
    changed = results.sources.__wrapped__()
    (tmp_path / "deep" / "one.py").rename(tmp_path / "deep" / "two.py")
    assert len({first, changed, results.sources.__wrapped__()}) == 3


def test_a_file_is_taken_up_where_a_killed_run_left_it(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    assert results.take_up(path) == []
    write(path, ROW)
    whole = path.read_bytes()
    assert results.take_up(path) == [ROW]
    path.write_bytes(whole + whole[:40])
    assert results.take_up(path) == [ROW]
    assert path.read_bytes() == whole
    path.write_bytes(whole[:40])
    assert results.take_up(path) == []
    assert path.read_bytes() == b""
    path.write_bytes(b"not ours\n" + whole)
    with pytest.raises(ValueError, match="line 1 must be"):
        results.take_up(path)
    with pytest.raises(ValueError, match="cannot be read"):
        results.take_up(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"commit": "1"}, {"versions": {"torch": "9"}}, {"device_name": "?"}, {"threads": 7}],
)
def test_rows_of_other_software_or_devices_have_another_origin(change: dict[str, object]) -> None:
    assert results.same_origin(ROW, timed(9.0))
    assert not results.same_origin(ROW, dataclasses.replace(ROW, **change))
