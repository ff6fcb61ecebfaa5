"""The rooms of a folder of implementations: a name in a table is the name of a file or folder."""

from pathlib import Path

import pytest

import tilework
from tilework import _implementations, catalog
from tilework._implementations import TABLES

ROOT = Path(tilework.__file__).parent
ROOMS = {"__init__", "operators", "common"}

# Where the implementations of a table live, by one of its names.
HOMES = {
    "losses.linear_cross_entropy": ("losses/_classes/linear",),
    "losses.cross_entropy_with_z_loss": ("losses/_classes/logits",),
    "losses.linear_kl_div": ("losses/linear_kl_div",),
    "norms.rms_norm": ("norms/_row_norm",),
    "norms.partial_rms_norm": ("norms/_row_norm",),
    "attention.attention_lse": ("attention/_attention_map",),
    "attention.block_pooled_attention": ("attention/_attention_map",),
    "attention.BlockLayout": ("attention/block_layout",),
    "attention.block_sparse_attention": ("attention/block_sparse",),
    "attention.block_sparse_decode": ("attention/block_sparse_decode",),
    "quant.packed_linear": ("quant/products/packed_linear",),
}
# What belongs to no implementation, and would make the contract or the operators too long.
MORE = {
    "losses/_classes/linear": {"schedule"},
    "losses/linear_kl_div": {"sharding"},
    "norms/_row_norm": {"sharding"},
    "attention/block_layout": {"checks", "flex", "patterns", "plot", "sets"},
}
catalog.entries()  # imports the families, which fill the tables
FOLDERS = sorted({folder for folders in HOMES.values() for folder in folders})


def rooms(folder: str) -> set[str]:
    """The names of the files and folders of code."""
    paths = (ROOT / folder).iterdir()
    return {path.stem for path in paths if path.suffix == ".py" or (path / "__init__.py").exists()}


def test_every_table_has_a_home() -> None:
    homeless = [names for names, _ in _implementations.shared() if not HOMES.keys() & set(names)]
    assert not homeless, "HOMES does not say in which folder"


def test_every_folder_with_a_reference_is_a_home() -> None:
    found = {str(path.parent.relative_to(ROOT)) for path in ROOT.rglob("reference.py")}
    assert found <= set(FOLDERS), "HOMES does not say for which table"


@pytest.mark.parametrize("table", HOMES)
def test_an_implementation_lives_in_a_file_of_its_name(table: str) -> None:
    for entry in TABLES[table]:
        homes = [folder for folder in HOMES[table] if entry.name in rooms(folder)]
        assert len(homes) == 1, f"{entry.name}: {homes}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_has_no_other_rooms(folder: str) -> None:
    names = {
        entry.name
        for table, folders in HOMES.items()
        if folder in folders
        for entry in TABLES[table]
    }
    assert rooms(folder) <= ROOMS | names | MORE.get(folder, set())
