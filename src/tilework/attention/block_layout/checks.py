"""The checks of arguments that describe blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tilework import _checks
from tilework.attention.block_layout.common import Grid, Lengths, Lists, ceil_div, first

BlockSize = int | tuple[int, int]
_UNBOUNDED = torch.iinfo(torch.int32).max


def pair(function: str, argument: str, value: object, least: int) -> tuple[int, int]:
    """Two ints, each at least ``least``; refuse anything else."""
    pair = tuple(value) if isinstance(value, Sequence) else (value,)
    for number in pair:
        _checks.integer(function, argument, number)
    if len(pair) != 2 or min(pair) < least:
        accepted = f"a pair of ints, each at least {least}"
        raise _checks.bad_value(function, argument, accepted, value)
    return pair


def block_pair(function: str, value: object) -> tuple[int, int]:
    """A block size as a pair; refuse sizes below 1."""
    return pair(function, "block_size", value if isinstance(value, Sequence) else (value,) * 2, 1)


def check_grid(
    function: str, rows: int, columns: int, block_size: object, seq_lengths: object
) -> Grid:
    """The grid of a layout, with its block size and lengths checked."""
    size = block_pair(function, block_size)
    if seq_lengths is None:
        return Grid(rows, columns, size, None)
    lengths = pair(function, "seq_lengths", seq_lengths, 0)
    if tuple(map(ceil_div, lengths, size)) != (rows, columns):
        accepted = f"lengths that give {(rows, columns)} blocks of {size}"
        raise _checks.bad_value(function, "seq_lengths", accepted, lengths)
    return Grid(rows, columns, size, lengths)


def grid_of(
    function: str, argument: str, tensor: Tensor, block_size: BlockSize, seq_lengths: Lengths
) -> Grid:
    """The grid of a tensor of shape ``(B, H, nq, nk)``."""
    if tensor.dim() != 4:
        raise _checks.bad_value(function, argument, "of shape (B, H, nq, nk)", tensor)
    rows, columns = tensor.shape[2:]
    return check_grid(function, rows, columns, block_size, seq_lengths)


def check_scores(
    function: str,
    scores: Tensor,
    block_size: BlockSize,
    seq_lengths: Lengths,
    num_sink_blocks: int,
) -> tuple[Grid, Tensor]:
    """The grid, and scores that can be compared; with the checks that both selections share."""
    _checks.floating(function, "scores", scores)
    grid = grid_of(function, "scores", scores, block_size, seq_lengths)
    _checks.count(function, "num_sink_blocks", num_sink_blocks, 0)
    scores = scores.detach()
    return grid, scores.float() if scores.dtype.itemsize == 1 else scores


def check_integers(function: str, argument: str, value: object) -> None:
    """Refuse what is not a tensor of an integer dtype."""
    if (
        not isinstance(value, Tensor)
        or value.dtype == torch.bool
        or value.is_floating_point()
        or value.is_complex()
    ):
        raise _checks.bad_type(function, argument, "an integer tensor", value)


def check_broadcasts(function: str, argument: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Refuse a tensor that does not broadcast to a shape."""
    sizes = zip(tensor.shape[::-1], shape[::-1], strict=False)
    if tensor.dim() > len(shape) or any(size not in (1, full) for size, full in sizes):
        raise _checks.bad_value(function, argument, f"broadcastable to {tuple(shape)}", tensor)


def per_head(function: str, **options: int | Sequence[int | None] | None) -> list[list[int]]:
    """Each option as a list with a number for each head."""
    counts = {len(value) for value in options.values() if isinstance(value, Sequence)}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(
            f"{function}: sequences must have the same number of heads, at least 1, in "
            f"{', '.join(options)}, got {sorted(counts)}"
        )
    heads = counts.pop() if counts else 1
    lists: list[list[Any]] = []
    for name, value in options.items():
        unbounded = None if name == "num_sink_blocks" else _UNBOUNDED
        lists.append([])
        for number in value if isinstance(value, Sequence) else [value] * heads:
            number = unbounded if number is None else number
            _checks.count(function, name, number, 0)
            lists[-1].append(number)
    return lists


def check_places(function: str, k: Tensor, scores: Tensor) -> Tensor:
    """A number of places for each row, int64; refuse negative ones on the CPU."""
    check_integers(function, "k", k)
    check_broadcasts(function, "k", k, scores.shape[:3])
    _checks.same_device(function, scores=scores, k=k)
    k = k.long()  # torch compares no wide unsigned integers
    if _checks.holds_values(k) and (k < 0).any():
        raise ValueError(f"{function}: k must be at least 0, got {int(k.min())}")
    return k


def check_lists(
    function: str,
    kv_indices: Tensor,
    kv_num_blocks: Tensor,
    num_kv_blocks: int,
    block_size: BlockSize,
    seq_lengths: Lengths,
) -> tuple[Grid, Lists]:
    """The grid of lists of distinct blocks, and the lists in order; values checked on the CPU."""
    for argument, tensor in {"kv_indices": kv_indices, "kv_num_blocks": kv_num_blocks}.items():
        check_integers(function, argument, tensor)
    _checks.count(function, "num_kv_blocks", num_kv_blocks, 0)
    if kv_indices.dim() != 4:
        raise _checks.bad_value(function, "kv_indices", "of shape (B, H, nq, W)", kv_indices)
    _checks.shape(function, "kv_num_blocks", kv_num_blocks, kv_indices.shape[:3])
    _checks.same_device(function, kv_indices=kv_indices, kv_num_blocks=kv_num_blocks)
    rows, width = kv_indices.shape[2:]
    grid = check_grid(function, rows, num_kv_blocks, block_size, seq_lengths)

    indices, counts = kv_indices.long(), kv_num_blocks.long()
    inside = first(counts, width)
    reads = _checks.holds_values(kv_indices) and _checks.holds_values(kv_num_blocks)
    if reads and ((counts < 0) | (counts > width)).any():
        raise ValueError(
            f"{function}: kv_num_blocks must be from 0 to {width}, "
            f"got {counts.min()} to {counts.max()}"
        )
    if reads and (inside & ((indices < 0) | (indices >= num_kv_blocks))).any():
        raise ValueError(
            f"{function}: kv_indices must be from 0 to {num_kv_blocks - 1} within the counts, "
            f"got {indices[inside].min()} to {indices[inside].max()}"
        )
    indices = indices.where(inside, num_kv_blocks).sort(dim=-1).values
    repeated = (indices.diff(dim=-1) == 0) & (indices[..., 1:] < num_kv_blocks)
    if reads and repeated.any():
        raise ValueError(
            f"{function}: kv_indices must be distinct within a row, got "
            f"{indices[..., 1:][repeated][0]} more than once"
        )
    return grid, Lists(counts, indices)
