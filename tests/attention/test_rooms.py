"""The rooms of a folder of implementations: a name in a table is the name of a file."""

from pathlib import Path

import pytest

from tilework import attention
from tilework._operators import TABLES

ROOMS = {"__init__", "common", "operators"}
# What belongs to no implementation and would make the contract too long.
MORE = {"block_layout": {"checks", "flex", "patterns", "plot", "sets"}}
NAMES = {
    "_attention_map": "attention_lse",
    "block_layout": "BlockLayout",
    "block_sparse": "block_sparse_attention",
    "block_sparse_decode": "block_sparse_decode",
}


@pytest.mark.parametrize("folder", NAMES)
def test_an_implementation_lives_in_a_file_of_its_name(folder: str) -> None:
    files = {path.stem for path in (Path(attention.__file__).parent / folder).glob("*.py")}
    names = {entry.name for entry in TABLES[f"attention.{NAMES[folder]}"]}
    assert names <= files
    assert files <= ROOMS | names | MORE.get(folder, set())


def test_every_folder_is_known() -> None:
    folders = {path.parent.name for path in Path(attention.__file__).parent.glob("*/__init__.py")}
    assert folders == NAMES.keys()
