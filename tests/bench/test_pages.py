import dataclasses
from pathlib import Path

import pytest
from bench import tiny_suite
from bench.test_results import ROW, write
from bench.test_scaling import grown

from tilework.bench import pages, suites
from tilework.bench.results import Row

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
PEER = dataclasses.replace(OURS, candidate="torch eager", peer=True, default=False, peak_bytes=None)
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


def test_a_summary_has_the_dtypes_of_a_case_side_by_side() -> None:
    narrow = dataclasses.replace(OURS, dtype="bfloat16", median=0.5, default=False)
    fast = dataclasses.replace(PEER, median=0.25, errors={"loss": 1e-3, "grad": 1.0})
    only = dataclasses.replace(PEER, candidate="another", dtype="bfloat16", peak_bytes=10**6)
    other = dataclasses.replace(OURS, case="work n=2")
    missing = dataclasses.replace(PEER, candidate="quack", status="missing", median=None)
    lines = pages.summary([OURS, narrow, fast, only, missing, other], "n=1").splitlines()
    assert lines == [
        "**s: work n=1** (an abacus, 2 threads, torch 2.13, abc)",
        "",
        "| candidate | float32 | memory | error of loss | bfloat16 | memory | error of loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| **tilework s** (default in float32) | 1 s | **129 MB** | **2.5e-07** "
        "| **500 ms** | 129 MB | **2.5e-07** |",
        "| torch eager | **250 ms** |  | 1.0e-03 |  |  |  |",
        "| another |  |  |  | 1 s | **1 MB** | **2.5e-07** |",
    ]
    assert "**tilework s** (default) |" in pages.summary([OURS, fast])
    assert "\n**not sound" in pages.summary([OURS, dataclasses.replace(fast, others_cpus=2.0)])
    with pytest.raises(ValueError, match="no case matches 'n=3'"):
        pages.summary([OURS], "n=3")


def test_the_default_stands_beside_the_strongest_peer() -> None:
    def case(dtype: str, **medians: float) -> list[Row]:
        kinds = {"ours": OURS, "other": dataclasses.replace(OURS, default=False)}
        return [
            dataclasses.replace(kinds.get(name, PEER), candidate=name, dtype=dtype, median=median)
            for name, median in medians.items()
        ]

    lost = case("float32", slow=3.0, ours=2.0, fast=1.0, other=0.5)
    refused = dataclasses.replace(lost[0], candidate="wrong", status="refused", median=0.1)
    won = case("float64", slow=3.0, ours=0.5)
    alone = case("float16", ours=0.5)
    none = case("bfloat16", other=0.5, slow=3.0)
    lines = pages.strongest([*lost, refused, *won, *alone, *none]).splitlines()
    assert lines == [
        "an abacus, 2 threads, torch 2.13, abc.",
        "",
        "|  | Tilework's default | the strongest peer |",
        "| --- | --- | --- |",
        "| s: work n=1, float32 | 2 s (ours) | **1 s** (fast) |",
        "| s: work n=1, float64 | **500 ms** (ours) | 3 s (slow) |",
        "| s: work n=1, float16 | **500 ms** (ours) | none was measured |",
        "| s: work n=1, bfloat16 | none was measured | **3 s** (slow) |",
    ]
    assert pages.strongest([*lost, *won], "float64").count("\n| s:") == 1
    won[0].others_cpus = 2.0
    assert "**not sound" in pages.strongest([*lost, *won])


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


def test_each_kind_of_block_is_filled_in_by_its_own(tmp_path: Path) -> None:
    write(tmp_path / "r.jsonl", OURS, PEER)
    page = tmp_path / "page.md"
    for kind, part in (
        ("table", "| candidate | median |"),
        ("summary", "| candidate | float32 | memory |"),
        ("strongest", "the strongest peer"),
    ):
        page.write_text(f"<!-- {kind} r.jsonl -->\n<!-- end -->\n")
        assert part in pages.refresh(page)


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
    "page",
    [REPOSITORY / "README.md", *sorted((REPOSITORY / "benchmarks").glob("*.md"))],
    ids=lambda path: str(path.relative_to(REPOSITORY)),
)
def test_the_pages_of_the_repository_hold_what_was_recorded(page: Path) -> None:
    text = page.read_text()
    if pages.BLOCK.search(text):
        assert pages.refresh(page) == text, "run: tilework page"
