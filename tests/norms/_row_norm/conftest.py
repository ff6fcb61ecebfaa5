from typing import Any

import numpy as np
import pytest
import torch

from tilework.norms._row_norm import tiled


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small problems take several tiles."""
    monkeypatch.setattr(tiled, "TILE", 64)


@pytest.fixture(autouse=True)
def rounding_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter round to bfloat16, as compilers do; it cuts off."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(input: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(input, source, target, mode)
        values = torch.from_numpy(np.ascontiguousarray(input).view(np.float32))
        return values.bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
