"""Lists of blocks that follow from positions alone: windows and documents."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tilework.attention.block_layout import sets
from tilework.attention.block_layout.common import Grid, Lists, ceil_div, longest


def window(
    grid: Grid,
    lefts: Sequence[int],
    rights: Sequence[int],
    sinks: Sequence[int],
    marked: Sequence[int],
    device: torch.device | str | None,
) -> Lists:
    """A band around the diagonal with first blocks, for each head, and blocks that all see."""
    rows, columns = grid.rows, grid.columns
    first_diagonal, last_diagonal = grid.diagonal(device)
    first = (first_diagonal - _column(lefts, device)).clamp_min(0)
    stop = (last_diagonal + 1 + _column(rights, device)).clamp_max(columns)
    width = max(lefts) + max(rights) + grid.most_diagonal
    if marked:
        whole = torch.isin(torch.arange(rows, device=device), torch.tensor(marked, device=device))
        first, stop = first.masked_fill(whole, 0), stop.masked_fill(whole, columns)
        width = columns
    lists = _intervals(first, stop, min(width, columns))
    if any(sinks):
        stop = _column(sinks, device).clamp_max(columns).expand(-1, rows)
        others = _intervals(torch.zeros_like(stop), stop, min(max(sinks), columns))
        lists = sets.union(lists, others, columns)
    held = [block for block in marked if block < columns]
    if held:
        indices = torch.tensor(held, device=device).expand(1, 1, rows, -1)
        counts = torch.full_like(indices[..., 0], len(held))
        lists = sets.union(lists, Lists(counts, indices), columns)
    return lists


def documents(document_ids: Tensor, block_size: tuple[int, int]) -> Tensor:
    """A mask ``(B, 1, nq, nk)`` of the blocks in which a query and a key are of one document."""
    batch, length = document_ids.shape
    found, order = document_ids.long().sort(stable=True)
    rank = (found.diff(prepend=found[:, :1]) != 0).cumsum(1)
    number = torch.empty_like(rank).scatter_(1, order, rank)
    most = longest(number + 1, length)
    position = torch.arange(length, device=document_ids.device)

    def members(block: int) -> Tensor:
        blocks = ceil_div(length, block)
        place = position // block * most + number
        table = torch.zeros(batch, blocks * most, device=document_ids.device)
        return table.scatter_(1, place, 1.0).reshape(batch, blocks, most)

    return (members(block_size[0]) @ members(block_size[1]).mT > 0)[:, None]


def _column(values: Sequence[int], device: torch.device | str | None) -> Tensor:
    return torch.tensor(values, device=device)[:, None]


def _intervals(first: Tensor, stop: Tensor, width: int) -> Lists:
    """Rows of consecutive blocks, shape ``(H, nq)``, at most ``width`` of them."""
    indices = first[..., None] + torch.arange(width, device=first.device)
    return Lists((stop - first).clamp_min(0)[None], indices[None])
