"""Index lists from masks and scores in plain PyTorch, on a CPU of some heads at a time."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework import _checks
from tilework.attention.block_layout.common import (
    Grid,
    Lists,
    Positions,
    TopK,
    forced_and_live,
    longest,
    or_sentinel,
)

AT_ONCE = 2**21  # blocks on a CPU: the memory for what is made of them is used again


def topk(given: TopK) -> Lists:
    """The lists of the forced blocks and of the highest scores among the live ones.

    Of equal scores the first are taken.
    """
    scores, places, most = given.scores, given.places, given.most
    if places is None:
        places = scores.new_full((1, 1, 1), most, dtype=torch.int32).expand(scores.shape[:3])
    rows, columns = scores.shape[2:]
    lengths = given.queries, columns * given.key_block
    grid = Grid(rows, columns, (given.query_block, given.key_block), lengths)
    forced, live = forced_and_live(
        grid, scores.device, given.num_sinks, given.is_causal, given.force_diagonal
    )
    taken = forced.sum(-1)
    live = live & ~forced

    def lists(scores: Tensor, places: Tensor) -> Lists:
        chosen = forced
        if most:
            eligible = (scores > -torch.inf) & live
            rest = (places - taken).clamp(0, most)[..., None]
            ranked = scores.where(eligible, -torch.inf)
            chosen = forced | _highest(ranked, eligible, rest, most)
        return _positions(Positions(chosen.expand(scores.shape), given.width))

    return _by_heads(lists, scores, places)


def _highest(scores: Tensor, eligible: Tensor, places: Tensor, most: int) -> Tensor:
    """Which elements have the ``places`` highest scores of a row, of equal ones the first.

    ``places``, at most ``most``, may differ between rows; what is not eligible scores -inf.
    """
    ranked = scores.topk(most, -1).values
    ranks = (places - 1).clamp_min(0)
    lowest = ranked.gather(-1, ranks)
    higher, equal = scores > lowest, scores == lowest
    room = places - (ranked > lowest).sum(-1, keepdim=True)
    return eligible & (higher | equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


def positions(given: Positions) -> Lists:
    """The number of True in each row, and the positions of the first ones."""
    return _by_heads(lambda mask: _positions(Positions(mask, given.width)), given.mask)


def _positions(given: Positions) -> Lists:
    """:func:`positions`, in one go."""
    mask, width = given
    # The t-th True stands where their running number reaches t.
    running = mask.cumsum(-1, dtype=torch.int32)
    counts = running[..., -1:].sum(-1, dtype=torch.int32)  # without columns, 0
    wanted = torch.arange(1, width + 1, dtype=torch.int32, device=mask.device)
    wanted = wanted.expand(*mask.shape[:-1], -1).contiguous()
    return Lists(counts, torch.searchsorted(running, wanted, out_int32=True))


def _by_heads(lists: Callable[..., Lists], *tensors: Tensor) -> Lists:
    """The lists of tensors ``(B, H, nq, ...)``, on a CPU of some heads at a time."""
    first = tensors[0]
    if not _checks.holds_values(first) or first.numel() <= AT_ONCE:
        return lists(*tensors)
    step = max(1, AT_ONCE // first[0, 0].numel())
    parts = zip(*(torch.split(x.flatten(0, 1), step) for x in tensors), strict=True)
    joined = map(torch.cat, zip(*(lists(*part) for part in parts), strict=True))
    counts, indices = (x.reshape(*first.shape[:2], *x.shape[1:]) for x in joined)
    return Lists(counts, indices)


def dense(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Lists of rows as a mask."""
    # One more column takes what is not active.
    mask = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=counts.device)
    padded = or_sentinel(counts, indices, columns).long()
    return mask.scatter_(-1, padded, True)[..., :columns].contiguous()


def transposed(counts: Tensor, indices: Tensor, columns: int) -> Lists:
    """The lists of the columns."""
    batch, heads, rows, width = indices.shape
    # Entries run through the rows, so that a stable sort by column keeps the rows in order.
    entries = or_sentinel(counts, indices, columns).flatten(2)
    column, entry = entries.sort(dim=-1, stable=True)
    borders = torch.arange(columns + 1, dtype=column.dtype, device=column.device)
    borders = borders.expand(batch, heads, -1).contiguous()
    starts = torch.searchsorted(column, borders, out_int32=True)
    counts = starts.diff(dim=-1)
    place = starts[..., :-1, None] + torch.arange(longest(counts, rows), device=column.device)
    entry = F.pad(entry, (0, 1)).gather(-1, place.flatten(2).clamp_max(column.shape[-1]))
    return Lists(counts, (entry // max(width, 1)).reshape(place.shape).int())
