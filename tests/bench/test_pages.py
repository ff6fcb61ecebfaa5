import dataclasses
from pathlib import Path

import pytest
from bench import tiny_suite
from bench.test_results import ROW, write
from bench.test_scaling import grown

from tilework.bench import pages, suites

REPOSITORY = Path(__file__).parents[2]
OURS = dataclasses.replace(
    ROW,
    default=True,
    peak_bytes=int(129e6),
    fraction_of_limit=0.61,
    errors={"loss": 2.5e-7},
    threads=2,
    versions={"torch": "2.13"},
    commit="abc",
)
PEER = dataclasses.replace(OURS, candidate="torch eager", peer=True, peak_bytes=None)
MISSING = dataclasses.replace(
    ROW, candidate="quack", peer=True, status="missing", reason="no such luck", median=None
)


def test_a_case_has_a_table_with_all_that_was_measured_and_reasons_for_the_rest() -> None:
    lines = pages.tables([OURS, PEER, dataclasses.replace(MISSING, versions=OURS.versions)])
    assert lines.splitlines()[0].startswith("**s: work n=1, float32** (an abacus, 2 threads")
    assert (
        "| **tilework s** | 1 s | 980 ms – 1.02 s | 129 MB | 61% | 2.5e-07 |" in lines.splitlines()
    )
    assert "| torch eager | 1 s | 980 ms – 1.02 s |  | 61% | 2.5e-07 |" in lines.splitlines()
    assert "quack: missing, no such luck" in lines


def test_tables_are_chosen_by_a_part_of_the_name() -> None:
    other = dataclasses.replace(OURS, case="work n=2", dtype="bfloat16")
    assert pages.tables([OURS, other]).count("| candidate |") == 2
    for pattern in ("n=2", "bfloat16", "s: work n=2, bf"):
        assert pages.tables([OURS, other], pattern).count("| candidate |") == 1
    with pytest.raises(ValueError, match="no case matches 'n=3'"):
        pages.tables([OURS], "n=3")


def test_exponents_stand_beside_the_expected_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "discover", lambda: {"tiny_suite": tiny_suite.SUITE})
    line = pages.exponents(grown()).splitlines()[4]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "tiny_suite, square",
        "n 8 – 1024",
        "× 16384",
        "45.3 µs – 65.5 ms",
        "1.50 ± 0.00",
        "2.00",
    ]
    with pytest.raises(ValueError, match="no series of growing work"):
        pages.exponents([OURS])


def test_disturbed_series_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "discover", lambda: {"tiny_suite": tiny_suite.SUITE})
    assert "not sound" not in pages.exponents(grown())
    rows = grown()
    rows[-1].others_cpus = 1.5
    assert "tiny_suite, square over n: **not sound: other processes kept 1.5" in pages.exponents(
        rows
    )


def test_a_page_is_filled_in_where_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "r.jsonl", OURS, dataclasses.replace(OURS, case="work n=2"))
    page = tmp_path / "page.md"
    block = "<!-- table sub/r.jsonl n=2 -->\nold\n<!-- end -->"
    page.write_text(f"before\n\n{block}\n\nbetween\n\n{block}\nafter\n")
    text = pages.refresh(page)
    assert text.startswith("before\n\n<!-- table sub/r.jsonl n=2 -->\n")
    assert text.count("s: work n=2, float32") == 2
    assert "old" not in text
    assert "n=1" not in text
    assert "between" in text
    assert text.endswith("<!-- end -->\nafter\n")
    page.write_text(text)
    assert pages.refresh(page) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("no block", "has no block to fill in"),
        ("<!-- table no.jsonl -->\n<!-- end -->", "no.jsonl cannot be read"),
    ],
)
def test_a_page_that_cannot_be_filled_in_says_why(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        pages.refresh(tmp_path / "page.md")


@pytest.mark.parametrize(
    "page", sorted((REPOSITORY / "benchmarks").glob("*.md")), ids=lambda p: p.name
)
def test_the_pages_of_the_repository_hold_what_was_recorded(page: Path) -> None:
    text = page.read_text()
    if pages.BLOCK.search(text):
        assert pages.refresh(page) == text, "run: tilework page"
