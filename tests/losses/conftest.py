from types import ModuleType

import pytest

from tilework.losses._classes import blocks, tiles
from tilework.losses._classes.linear import chunked


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small problems take several tiles, shares and panels."""
    from tilework.losses._classes import kernels
    from tilework.losses.linear_kl_div import triton as kl_div_triton

    def patch(module: ModuleType, **values: int) -> None:
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)

    patch(tiles, TOKENS=16, TILE=16 * 24)
    patch(chunked, CPU_TOKENS=16, MIN_CPU_TOKENS=8)
    patch(blocks, ELEMENTS=16 * 24)
    patch(kernels, SHARE=48, MAX_SHARES=3, PANEL_TOKENS=32, PANEL_CLASSES=64)
    patch(kl_div_triton, SHARE=72, MAX_SHARES=3)
