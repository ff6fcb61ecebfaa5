"""The kernels that make lists of blocks, as operators. They do not differentiate."""

from typing import Any

import torch
from torch import Tensor

from tilework import _implementations, _operators
from tilework._implementations import FLOATING, TABLES, Implementation

MAX_COLUMNS = 8192  # whose scores one program holds in registers
MAX_ELEMENTS = 2**30  # rows and entries are numbered in 32 bits


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
        "torch",
        "the lists; masks, ranks and running counts of all blocks, on a CPU of some heads",
        dtypes=(*FLOATING, torch.float8_e4m3fn, torch.float8_e5m2, *_LISTS),
        backward="none",
    ),
)


def take(tensor: Tensor, **given: Any) -> bool:
    """Whether the kernels are the better choice for masks, lists or scores."""
    chosen = _implementations.choose("BlockLayout", IMPLEMENTATIONS, None, tensor, **given)
    return chosen == "triton"


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


topk = _operators.define_by_position(
    "block_layout_topk(Tensor scores, Tensor? places, SymInt most, SymInt width, SymInt bq, "
    "SymInt bk, SymInt queries, SymInt num_sinks, bool is_causal, bool force_diagonal) "
    "-> (Tensor, Tensor)",
    lambda *args: _kernels().topk(*args),
    lambda scores, places, most, width, *_: _lists_fake(scores, width),
    setup_context=_save_nothing,
    backward=_refuse,
)
positions = _operators.define_by_position(
    "block_layout_positions(Tensor mask, SymInt width) -> (Tensor, Tensor)",
    lambda *args: _kernels().positions(*args),
    _lists_fake,
    setup_context=_save_nothing,
    backward=_refuse,
)
dense = _operators.define_by_position(
    "block_layout_dense(Tensor counts, Tensor indices, SymInt columns, bool is_transposed) "
    "-> Tensor",
    lambda *args: _kernels().dense(*args),
    _dense_fake,
    setup_context=_save_nothing,
    backward=_refuse,
)
