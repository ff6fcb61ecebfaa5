"""Index lists from masks and scores."""

import torch
import torch.nn.functional as F
from torch import Tensor


def highest(scores: Tensor, eligible: Tensor, places: Tensor, most: int) -> Tensor:
    """Which elements have the ``places`` highest scores of a row, of equal ones the first.

    ``places``, at most ``most``, may differ between rows; what is not eligible scores -inf.
    """
    ranked = scores.topk(most, -1).values
    ranks = (places - 1).clamp_min(0).expand(*scores.shape[:3], 1)
    lowest = ranked.gather(-1, ranks)
    higher, equal = scores > lowest, scores == lowest
    room = places - (ranked > lowest).sum(-1, keepdim=True)
    return eligible & (higher | equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def positions(keep: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
    """The number of True in each row, and the positions of the first ``width`` (None: of all)."""
    # The t-th True stands where their running number reaches t.
    running = keep.cumsum(-1, dtype=torch.int32)
    counts = running[..., -1:].sum(-1, dtype=torch.int32)  # without columns, 0
    width = longest(counts) if width is None else width
    wanted = torch.arange(1, width + 1, dtype=torch.int32, device=keep.device)
    wanted = wanted.expand(*keep.shape[:-1], -1).contiguous()
    return counts, torch.searchsorted(running, wanted, out_int32=True)


def count_up_to(bound: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    """How many entries of each row, which is in order, are at most ``bound``."""
    kept = first(counts, indices.shape[-1]) & (indices <= bound)
    return kept.sum(-1, dtype=torch.int32)


def transposed(columns: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """The counts and row lists of each column; ``num_columns`` stands where there is no block."""
    batch, heads, _, width = columns.shape
    # Entries run through the rows, so that a stable sort by column keeps the rows in order.
    column, entry = columns.flatten(2).sort(dim=-1, stable=True)
    borders = torch.arange(num_columns + 1, dtype=column.dtype, device=column.device)
    borders = borders.expand(batch, heads, -1).contiguous()
    starts = torch.searchsorted(column, borders, out_int32=True)
    counts = starts.diff(dim=-1)
    place = starts[..., :-1, None] + torch.arange(longest(counts), device=column.device)
    entry = F.pad(entry, (0, 1)).gather(-1, place.flatten(2).clamp_max(column.shape[-1]))
    return counts, (entry // max(width, 1)).reshape(place.shape).int()


def longest(counts: Tensor) -> int:
    """The largest count, for which the host waits; 0 of nothing."""
    return int(counts.max()) if counts.numel() else 0


def first(counts: Tensor, width: int) -> Tensor:
    """Which of ``width`` entries lie within the count of their row."""
    return torch.arange(width, device=counts.device) < counts[..., None]
