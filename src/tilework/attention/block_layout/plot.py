"""A picture of a layout."""

from typing import Any

from torch import Tensor


def draw(function: str, mask: Tensor, block_size: tuple[int, int], title: str, ax: Any) -> Any:
    """Draw the active blocks of a head, bool of shape ``(nq, nk)``."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            f"{function}: needs matplotlib: pip install 'tilework[bench]' ({error})"
        ) from error
    if ax is None:
        ax = pyplot.subplots()[1]
    bq, bk = block_size
    ax.imshow(
        mask.cpu().numpy(),
        cmap="Greys",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        aspect=bq / bk,
    )
    ax.set(xlabel=f"block of {bk} keys", ylabel=f"block of {bq} queries", title=title)
    return ax
