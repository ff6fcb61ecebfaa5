"""Index lists by kernels where these take them, which do not differentiate, else by PyTorch."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from tilework import _implementations, _operators
from tilework._implementations import FLOATING, TABLES, Implementation
from tilework.attention.block_layout import tiled
from tilework.attention.block_layout.common import Dense, Lists, Mask, Positions, TopK, longest

MAX_COLUMNS = 8192  # whose scores one program holds in registers
MAX_ELEMENTS = 2**30  # rows and entries are numbered in 32 bits
WAITLESS = 2**24  # entries of columns' lists that need not be as short as can be: 64 MiB
SPARSE = 32  # columns for an entry of a row, from which a sort of entries is less than a mask


def _prefers_kernels(
    tensor: Tensor, *, ranked: int = 0, blocks: int = 0, is_sparse: bool = False
) -> bool:
    """For scores of ``ranked`` columns, or lists from whose ``blocks`` a mask would be made."""
    return not is_sparse and ranked <= MAX_COLUMNS and max(tensor.numel(), blocks) <= MAX_ELEMENTS


_LISTS = (torch.bool, torch.int32, torch.int64)  # masks and lists of blocks
IMPLEMENTATIONS = TABLES["attention.BlockLayout"] = (
    Implementation.triton(
        "the lists, those of columns with room for all rows up to 2**24 blocks; a byte for each "
        "block while they are made",
        dtypes=(*FLOATING, *_LISTS),
        backward="none",
        prefers=_prefers_kernels,
        when=f"highest scores of rows of up to {MAX_COLUMNS} blocks, and all else but lists of "
        "columns of a sparse layout",
    ),
    Implementation(
        "tiled",
        "the lists; masks, ranks and running counts of all blocks, on a CPU of some heads",
        dtypes=(*FLOATING, torch.float8_e4m3fn, torch.float8_e5m2, *_LISTS),
        backward="none",
    ),
)


def topk(given: TopK) -> Lists:
    """See ``tiled``."""
    by_kernels = _takes(given.scores, ranked=given.scores.shape[-1])
    return _topk(given) if by_kernels else tiled.topk(given)


def positions(mask: Tensor, width: int | None) -> Lists:
    """See ``tiled``; None is the width of the longest list, for which the host waits."""
    if width is None:
        width = longest(mask.sum(-1, dtype=torch.int32), mask.shape[-1])
    given = Positions(mask, width)
    return _positions(given) if _takes(mask) else tiled.positions(given)


def dense(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """See ``tiled``."""
    if not _takes(indices):
        return tiled.dense(counts, indices, columns)
    return _dense(Dense(counts, indices, columns, False)).mask


def transposed(counts: Tensor, indices: Tensor, columns: int) -> Lists:
    """See ``tiled``."""
    rows, width = indices.shape[2:]
    blocks = counts.numel() * columns
    if not _takes(counts, blocks=blocks, is_sparse=columns >= SPARSE * width):
        return tiled.transposed(counts, indices, columns)
    mask = _dense(Dense(counts, indices, columns, True)).mask
    return positions(mask, rows if blocks <= WAITLESS else None)


def _takes(tensor: Tensor, **given: Any) -> bool:
    """Whether the kernels are the better choice for masks, lists or scores."""
    chosen = _implementations.choose("BlockLayout", IMPLEMENTATIONS, None, tensor, **given)
    return chosen == "triton"


def _kernels() -> Any:
    """The module of the kernels, imported on its first use."""
    from tilework.attention.block_layout import triton

    return triton


def _topk_fake(given: TopK) -> Lists:
    return _positions_fake(Positions(given.scores, given.width))


def _positions_fake(given: Positions) -> Lists:
    shape = given.mask.shape[:3]
    return Lists(
        given.mask.new_empty(shape, dtype=torch.int32),
        given.mask.new_empty(*shape, given.width, dtype=torch.int32),
    )


def _dense_fake(given: Dense) -> Mask:
    batch, heads, rows = given.counts.shape
    shape = (given.columns, rows) if given.is_transposed else (rows, given.columns)
    return Mask(given.counts.new_empty(batch, heads, *shape, dtype=torch.bool))


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError("BlockLayout: which blocks are active has no gradient")


_topk = _operators.define(
    "block_layout_topk",
    TopK,
    Lists,
    lambda given: _kernels().topk(given),
    _topk_fake,
    derivative=_refuse,
)
_positions = _operators.define(
    "block_layout_positions",
    Positions,
    Lists,
    lambda given: _kernels().positions(given),
    _positions_fake,
    derivative=_refuse,
)
_dense = _operators.define(
    "block_layout_dense",
    Dense,
    Mask,
    lambda given: _kernels().dense(given),
    _dense_fake,
    derivative=_refuse,
)
