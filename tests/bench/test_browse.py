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


@pytest.mark.parametrize("width", [80, 200])
def test_names_are_whole_and_have_a_use_and_a_paper(width: int) -> None:
    entries = catalog.entries()
    console = Console(file=io.StringIO(), width=width)
    console.print(browse.names(entries))
    printed = console.file.getvalue().splitlines()
    assert max(map(len, printed)) <= width
    rows = [line.split("│") for line in printed if "│" in line]
    names = [row[1].strip() for row in rows]
    assert list(filter(None, names)) == [entry.name.removeprefix("tilework.") for entry in entries]
    about = " ".join(" ".join(row[2] for row in rows).split())
    assert "Cut Your Losses in Large-Vocabulary Language Models, 2024, arXiv 2411.09009" in about
    assert "F.cross_entropy plus a penalty on the squared log-sum-exp of the logits." in about
    assert "`" not in about


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


def test_a_method_of_a_public_class_is_found() -> None:
    for name in ("BlockLayout.from_window", "tilework.attention.BlockLayout.from_window"):
        entry, attribute = browse.find(name)
        shown = text(browse.describe(entry, attribute))
        assert shown.startswith("tilework.attention.BlockLayout.from_window(")
        assert "A band of blocks around the diagonal" in shown
        assert "implementation" in shown
    shown = text(browse.describe(*browse.find("BlockLayout.device")))
    assert shown.startswith("tilework.attention.BlockLayout.device\n")
    assert browse.find("losses.linear_cross_entropy")[1] is None
    for name in ("BlockLayout.no_such", "BlockLayout.__init__", "squentropy.__doc__", "zzz.from"):
        with pytest.raises(KeyError, match="must match one public name"):
            browse.find(name)


def test_misspelt_names_have_close_matches() -> None:
    assert "tilework.losses.linear_cross_entropy" in browse.close_matches(
        "losses.linear_crossentropy"
    )
    assert browse.close_matches("zzzzzz") == []
