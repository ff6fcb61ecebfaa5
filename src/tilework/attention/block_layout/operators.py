"""Index lists by kernels where these take them, which do not differentiate, else by PyTorch."""

from typing import Any

import torch
from torch import Tensor

from tilework import _operators
from tilework._operators import Implementation
from tilework.attention.block_layout import tiled
from tilework.attention.block_layout.common import Grid, Lists, longest

MAX_COLUMNS = 8192  # whose scores one program holds in registers
MAX_ELEMENTS = 2**30  # rows and entries are numbered in 32 bits
WAITLESS = 2**24  # entries of columns' lists that need not be as short as can be: 64 MiB
SPARSE = 32  # columns for an entry of a row, from which a sort of entries is less than a mask

IMPLEMENTATIONS = _operators.TABLES["attention.BlockLayout"] = (
    Implementation(
        "triton",
        devices=("cuda",),
        dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        memory="the lists, those of columns with room for all rows up to 2**24 blocks; a byte for "
        "each block while they are made",
        backward="none",
        deterministic=True,
        needs="triton",
        checked_on="Triton's interpreter",
    ),
    Implementation(
        "tiled",
        devices=(),
        dtypes=(
            torch.float16,
            torch.bfloat16,
            torch.float32,
            torch.float64,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
        ),
        memory="the lists; masks, ranks and running counts of all blocks, on a CPU of some heads",
        backward="none",
        deterministic=True,
        checked_on="CPU",
    ),
)


def topk(
    scores: Tensor,
    places: Tensor | None,
    most: int,
    width: int,
    grid: Grid,
    num_sinks: int,
    is_causal: bool,
    force_diagonal: bool,
) -> Lists:
    """See ``tiled``."""
    if not _takes_scores(scores):
        return tiled.topk(scores, places, most, width, grid, num_sinks, is_causal, force_diagonal)
    lists: Lists = _topk(
        scores,
        places,
        most,
        width,
        *grid.block_size,
        grid.lengths[0],
        min(num_sinks, grid.columns),
        is_causal,
        force_diagonal,
    )
    return lists


def positions(keep: Tensor, width: int | None) -> Lists:
    """See ``tiled``; None is the width of the longest list, for which the host waits."""
    if width is None:
        width = longest(keep.sum(-1, dtype=torch.int32))
    lists: Lists = (_positions if _takes(keep) else tiled.positions)(keep, width)
    return lists


def dense(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """See ``tiled``."""
    if not _takes(indices):
        return tiled.dense(counts, indices, columns)
    mask: Tensor = _dense(counts, indices, columns, False)
    return mask


def transposed(counts: Tensor, indices: Tensor, columns: int) -> Lists:
    """See ``tiled``."""
    rows, width = indices.shape[2:]
    blocks = counts.numel() * columns
    if not _takes(counts) or columns >= SPARSE * width or blocks > MAX_ELEMENTS:
        return tiled.transposed(counts, indices, columns)
    return positions(_dense(counts, indices, columns, True), rows if blocks <= WAITLESS else None)


def _takes(tensor: Tensor) -> bool:
    """Whether the kernels take the masks, lists or scores of a device."""
    kernels = IMPLEMENTATIONS[0]
    return (
        tensor.device.type in kernels.devices
        and kernels.installed
        and tensor.numel() <= MAX_ELEMENTS
    )


def _takes_scores(scores: Tensor) -> bool:
    """Whether the kernel of the highest scores takes these."""
    kernels = IMPLEMENTATIONS[0]
    return _takes(scores) and scores.dtype in kernels.dtypes and scores.shape[-1] <= MAX_COLUMNS


def _kernels() -> Any:
    """The module of the kernels, imported on its first use."""
    from tilework.attention.block_layout import triton

    return triton


def _lists_fake(tensor: Tensor, width: int) -> tuple[Tensor, Tensor]:
    shape = tensor.shape[:3]
    return (
        tensor.new_empty(shape, dtype=torch.int32),
        tensor.new_empty(*shape, width, dtype=torch.int32),
    )


def _dense_fake(counts: Tensor, indices: Tensor, columns: int, is_transposed: bool) -> Tensor:
    batch, heads, rows = counts.shape
    shape = (columns, rows) if is_transposed else (rows, columns)
    return counts.new_empty(batch, heads, *shape, dtype=torch.bool)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError("BlockLayout: which blocks are active has no gradient")


_topk = _operators.define_by_position(
    "block_layout_topk(Tensor scores, Tensor? places, SymInt most, SymInt width, SymInt bq, "
    "SymInt bk, SymInt queries, SymInt num_sinks, bool is_causal, bool force_diagonal) "
    "-> (Tensor, Tensor)",
    lambda *args: _kernels().topk(*args),
    lambda scores, places, most, width, *_: _lists_fake(scores, width),
    setup_context=_save_nothing,
    backward=_refuse,
)
_positions = _operators.define_by_position(
    "block_layout_positions(Tensor mask, SymInt width) -> (Tensor, Tensor)",
    lambda *args: _kernels().positions(*args),
    _lists_fake,
    setup_context=_save_nothing,
    backward=_refuse,
)
_dense = _operators.define_by_position(
    "block_layout_dense(Tensor counts, Tensor indices, SymInt columns, bool is_transposed) "
    "-> Tensor",
    lambda *args: _kernels().dense(*args),
    _dense_fake,
    setup_context=_save_nothing,
    backward=_refuse,
)
