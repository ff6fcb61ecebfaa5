import io

import pytest
from rich.console import Console

from tilework import catalog
from tilework.bench import browse
from tilework.catalog import Entry


def text(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


def test_names_have_their_papers() -> None:
    line = next(
        line
        for line in text(browse.names(catalog.entries())).splitlines()
        if "losses.linear_cross_entropy" in line
    )
    assert "Cut Your Losses in Large-Vocabulary Language Models" in line
    assert "2024" in line
    assert "2411.09009" in line


def function(input: int, scale: float = 2.0, *, mode: str = "a", deep: bool = False) -> int:
    """Do nothing.

    At all.
    """
    return input


function.__module__ = "tilework.losses.function"


def test_a_name_without_a_paper_has_its_reason() -> None:
    entry = Entry(function, None, "everyone knows it")
    assert "no paper: everyone knows it" in text(browse.names([entry]))
    shown = text(browse.describe(entry))
    assert "No paper: everyone knows it" in shown
    assert "implementation" not in shown


def test_a_signature_has_one_parameter_on_a_line() -> None:
    lines = text(browse.describe(Entry(function, None, "none"))).splitlines()
    assert lines[:7] == [
        "tilework.losses.function(",
        "    input: int,",
        "    scale: float = 2.0,",
        "    *,",
        "    mode: str = 'a',",
        "    deep: bool = False,",
        ") -> int",
    ]
    assert "At all." in lines


def test_an_accelerated_name_shows_its_implementations_and_paper() -> None:
    for name in ("linear_cross_entropy", "LinearCrossEntropyLoss"):
        shown = text(browse.describe(catalog.find(f"losses.{name}")))
        assert "https://arxiv.org/abs/2411.09009" in shown
        _, heading, table = shown.rpartition("checked on")
        assert heading
        assert "tiled" in table


@pytest.mark.parametrize(
    "name",
    [
        "attention.BlockLayout",
        "attention.block_sparse_attention",
        "losses.linear_squentropy",
        "losses.LinearKLDivLoss",
        "norms.RMSNorm",
    ],
)
def test_every_name_of_a_table_shows_it(name: str) -> None:
    assert "default on" in text(browse.describe(catalog.find(name)))


def test_misspelt_names_have_close_matches() -> None:
    assert "tilework.losses.linear_cross_entropy" in browse.close_matches(
        "losses.linear_crossentropy"
    )
    assert browse.close_matches("zzzzzz") == []
