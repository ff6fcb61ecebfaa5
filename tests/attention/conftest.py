import pytest


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small problems take several tiles."""
    from tilework.attention._attention_map import tiled

    monkeypatch.setattr(tiled, "QUERIES", 16)
    monkeypatch.setattr(tiled, "KEYS", 12)
    monkeypatch.setattr(tiled, "SCORES", 3 * 2 * 16 * 12)
