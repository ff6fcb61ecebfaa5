"""The examples of the README run, and its commands exist."""

import re
from pathlib import Path

import pytest

import tilework
from tilework import catalog
from tilework._implementations import TABLES
from tilework.bench import pages

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.untyped
@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_examples_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_commands_exist() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):.*##", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake (\w+)", README))
    assert {"demo", "test"} <= named <= targets
    commands = {"list", "show", "doctor", "bench", "plot"}
    assert set(re.findall(r"^tilework (\w+)", README, re.MULTILINE)) == commands


def test_figures_of_speed_stand_in_blocks_that_are_filled_in_from_rows() -> None:
    """``tests/bench/test_pages.py`` compares the blocks with the rows."""
    section = README.split("\n## What is fast", 1)[1].split("\n## ", 1)[0]
    prose, blocks = pages.BLOCK.subn("", section)
    assert blocks
    assert not re.findall(r"\d[\d.,]*\s?(?:ns|µs|us|ms|s|[kMG]i?B|%)(?!\w).*", prose)


def rows(heading: str) -> list[list[str]]:
    """The cells of the table with such a heading."""
    table = README.split(f"\n| {heading} |", 1)[1].split("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


def test_families_are_those_with_public_names() -> None:
    found = [name for family, _ in rows("family") for name in names(family)]
    assert found == [family for family in tilework.FAMILIES if getattr(tilework, family).__all__]


def test_flagships_have_these_implementations() -> None:
    flagships = rows("| implements")
    assert flagships
    for which, _, implementations in flagships:
        for name in names(which):
            assert catalog.find(name).name == f"tilework.{name}"
            assert [entry.name for entry in TABLES[name]] == names(implementations)
