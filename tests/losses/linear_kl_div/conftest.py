import pytest

from tilework.losses.linear_cross_entropy import shared


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small problems take several tiles of tokens and classes."""
    monkeypatch.setattr(shared, "TOKENS", 16)
    monkeypatch.setattr(shared, "TILE", 16 * 24)
