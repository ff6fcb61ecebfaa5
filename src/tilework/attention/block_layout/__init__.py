"""Which blocks of keys each block of queries attends to, as compact index lists."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Integer, Shaped
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tilework import _checks
from tilework.attention.block_layout import flex, lists, operators
from tilework.attention.block_layout.grid import (
    BlockSize,
    Grid,
    Lengths,
    block_pair,
    ceil_div,
    check_broadcasts,
    check_integers,
    check_places,
    check_scores,
    forced_and_live,
    grid_of,
    pair,
    per_head,
)
from tilework.catalog import implements

__all__ = ["BlockLayout", "causal_topk"]

_NAME = "BlockLayout"
_PAPER = implements(
    "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    year=2024,
    arxiv="2410.13276",
)


@_PAPER
def causal_topk(num_blocks: int, density: float) -> int:
    r"""The number of blocks per row at which a causal layout has about a given density.

    With :math:`n` = ``num_blocks`` and :math:`d` = ``density``:

    .. math::

        k = \max(1, \lfloor (1 - \sqrt{1 - d})\, n \rfloor)

    Args:
        num_blocks: Blocks in a row and in a column, at least 0.
        density: The part of the live blocks to keep, 0 to 1.

    Returns:
        The ``k`` of :meth:`BlockLayout.from_scores_topk`.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is not a number, or ``num_blocks`` not an int.

    Example:
        >>> from tilework.attention import causal_topk
        >>> causal_topk(512, 0.19)
        51

    Reference:
        As :class:`BlockLayout`.
    """
    _checks.count("causal_topk", "num_blocks", num_blocks, 0)
    _checks.fraction("causal_topk", "density", density)
    return max(1, int((1 - math.sqrt(1 - density)) * num_blocks))


@_PAPER
@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout:
    r"""The set of blocks that block-sparse attention computes.

    With ``block_size`` :math:`(b_q, b_k)`, lengths :math:`(L_q, L_k)` and :math:`n_q = \lceil L_q /
    b_q \rceil`, :math:`n_k = \lceil L_k / b_k \rceil`, block :math:`(i, j)` holds the queries
    :math:`i b_q, \dots, \min((i + 1) b_q, L_q) - 1` and the keys :math:`j b_k, \dots, \min((j + 1)
    b_k, L_k) - 1`. The layout is a set of active blocks :math:`A_{bhij}`, stored by rows:

    .. math::

        \texttt{kv\_num\_blocks}_{bhi} = |\{j : A_{bhij}\}|, \qquad
        \texttt{kv\_indices}_{bhi} = (j : A_{bhij}) \text{ increasing, then anything}

    ``q_num_blocks`` and ``q_indices`` are the same lists of the transposed set. A size of 1 of
    batch or heads stands for all of them; as many heads as there are of keys are each shared by a
    group of query heads. With ``is_causal``, a block is *live* if one of its pairs is visible,
    :math:`j b_k \le \min((i + 1) b_q, L_q) - 1`. The *diagonal* blocks of a row are those that hold
    a position of its queries. Without ``seq_lengths``, :math:`n_q b_q` stands for :math:`L_q`.

    Layouts are made by the class methods, are never changed, and compare by content.

    On a CUDA device with Triton, :meth:`from_scores_topk` is one kernel, which reads the scores
    once and writes the lists. Elsewhere, and for more than 8192 columns, it ranks the rows and
    passes about ten times over what is as large as the scores, on a CPU by a few heads at a time.
    ``q_num_blocks`` and ``q_indices`` are made on their first use: on a CUDA device with Triton,
    from a mask of a byte for each block, which is written and read; elsewhere, and where rows have
    at least 32 times as many blocks as ``kv_indices`` has places, by a sort of the entries.

    Nothing waits for a CUDA device but what needs the length of the longest list: ``from_dense``,
    ``from_scores_threshold``, ``from_documents``, a tensor ``k``, and the first use of
    ``q_num_blocks`` or ``q_indices`` where they are sorted, or where there are more than
    :math:`2^{24}` blocks; furthermore ``from_window``, which copies its options there,
    ``from_flex(partial="error")``, ``==``, ``repr`` and ``plot``.

    Args:
        kv_num_blocks: int32 of shape ``(B, H, nq)``; this constructor trusts its arguments.
        kv_indices: int32 of shape ``(B, H, nq, W)``, each row in order; ``W`` is at least the
            largest count.
        num_kv_blocks: The number :math:`n_k` of key blocks.
        block_size: Queries and keys of a block.
        seq_lengths: The only lengths that the layout fits, or None for all that give
            :math:`(n_q, n_k)`.

    Raises:
        ValueError: A class method's argument has a wrong shape or value.
        TypeError: It is of a wrong type or dtype.

    Example:
        >>> import torch
        >>> from tilework.attention import BlockLayout
        >>> scores = torch.tensor([[0.0, 9, 9, 9], [1, 0, 9, 9], [2, 1, 0, 9], [1, 3, 2, 0]])
        >>> layout = BlockLayout.from_scores_topk(scores[None, None], 2, is_causal=True)
        >>> layout
        BlockLayout(shape=(1, 1, 4, 4), block_size=(64, 64), density=0.438)
        >>> layout.to_dense()[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 0, 1, 0],
                [0, 1, 0, 1]], dtype=torch.int32)
        >>> layout | BlockLayout.from_window((256, 256), left=0, num_sink_blocks=1, is_causal=True)
        BlockLayout(shape=(1, 1, 4, 4), block_size=(64, 64), seq_lengths=(256, 256), density=0.5)

    Deviations:
        The released selection does not force the diagonal, so that a threshold can empty a row,
        for which its kernel returns nan. Its last two block rows are dense by an option: here that
        is ``|`` with another layout. Its top-k runs over the whole row and is cut to the lower
        triangle afterwards, so that early rows keep fewer blocks than they could: here only live
        blocks compete.

    Reference:
        Yizhao Gao, Zhichen Zeng, Dayou Du, Shijie Cao, Peiyuan Zhou, Jiaxing Qi, Junjie Lai, Hayden
        Kwok-Hay So, Ting Cao, Fan Yang, Mao Yang. SeerAttention: Learning Intrinsic Sparse
        Attention in Your LLMs. 2024. arXiv:2410.13276.
    """

    kv_num_blocks: Int32[Tensor, "batch heads rows"]
    kv_indices: Int32[Tensor, "batch heads rows width"]
    num_kv_blocks: int
    block_size: tuple[int, int]
    seq_lengths: Lengths = None

    @classmethod
    def from_dense(
        cls,
        mask: Bool[Tensor, "batch heads rows columns"],
        block_size: BlockSize = (64, 64),
        *,
        seq_lengths: Lengths = None,
    ) -> "BlockLayout":
        """The blocks where ``mask``, bool of shape ``(B, H, nq, nk)``, is True."""
        name = f"{_NAME}.from_dense"
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise _checks.bad_type(name, "mask", "a bool tensor", mask)
        return cls._of_mask(grid_of(name, "mask", mask, block_size, seq_lengths), mask)

    @classmethod
    def from_indices(
        cls,
        kv_indices: Integer[Tensor, "batch heads rows width"],
        kv_num_blocks: Integer[Tensor, "batch heads rows"],
        num_kv_blocks: int,
        block_size: BlockSize = (64, 64),
        *,
        seq_lengths: Lengths = None,
    ) -> "BlockLayout":
        """The first ``kv_num_blocks`` ``(B, H, nq)`` of ``kv_indices`` ``(B, H, nq, W)``.

        Both of any integer dtype, the indices distinct and in any order. What stands after the
        counts is not read. Values are checked on the CPU.
        """
        name = f"{_NAME}.from_indices"
        for argument, tensor in {"kv_indices": kv_indices, "kv_num_blocks": kv_num_blocks}.items():
            check_integers(name, argument, tensor)
        _checks.count(name, "num_kv_blocks", num_kv_blocks, 0)
        if kv_indices.dim() != 4:
            raise _checks.bad_value(name, "kv_indices", "of shape (B, H, nq, W)", kv_indices)
        _checks.shape(name, "kv_num_blocks", kv_num_blocks, kv_indices.shape[:3])
        _checks.same_device(name, kv_indices=kv_indices, kv_num_blocks=kv_num_blocks)
        rows, width = kv_indices.shape[2:]
        grid = Grid.checked(name, rows, num_kv_blocks, block_size, seq_lengths)

        indices, counts = kv_indices.long(), kv_num_blocks.long()
        inside = lists.first(counts, width)
        reads = _checks.holds_values(kv_indices) and _checks.holds_values(kv_num_blocks)
        if reads and ((counts < 0) | (counts > width)).any():
            raise ValueError(
                f"{name}: kv_num_blocks must be from 0 to {width}, "
                f"got {counts.min()} to {counts.max()}"
            )
        if reads and (inside & ((indices < 0) | (indices >= num_kv_blocks))).any():
            raise ValueError(
                f"{name}: kv_indices must be from 0 to {num_kv_blocks - 1} within the counts, "
                f"got {indices[inside].min()} to {indices[inside].max()}"
            )
        indices = indices.where(inside, num_kv_blocks).sort(dim=-1).values
        repeated = (indices.diff(dim=-1) == 0) & (indices[..., 1:] < num_kv_blocks)
        if reads and repeated.any():
            raise ValueError(
                f"{name}: kv_indices must be distinct within a row, got "
                f"{indices[..., 1:][repeated][0]} more than once"
            )
        return cls._on(grid, counts, indices)

    @classmethod
    def from_scores_topk(
        cls,
        scores: Float[Tensor, "batch heads rows columns"],
        k: int | Integer[Tensor, "..."],
        block_size: BlockSize = (64, 64),
        *,
        is_causal: bool = False,
        force_diagonal: bool = True,
        num_sink_blocks: int = 0,
        seq_lengths: Lengths = None,
    ) -> "BlockLayout":
        """The ``k`` blocks of each row with the highest ``scores``, shape ``(B, H, nq, nk)``.

        Diagonal blocks (``force_diagonal``) and the first ``num_sink_blocks`` are kept and count
        towards ``k``, an int or an integer tensor that broadcasts to ``(B, H, nq)``; there may be
        more of them. Of equal scores the earlier block is kept. Blocks of score -inf or nan, and
        with ``is_causal`` those that are not live, do not compete.
        """
        name = f"{_NAME}.from_scores_topk"
        grid, scores = check_scores(name, scores, block_size, seq_lengths, num_sink_blocks)
        columns = grid.columns
        places = None
        if isinstance(k, Tensor):
            places = check_places(name, k, scores).expand(scores.shape[:3])
            most = min(max(lists.longest(places), 0), columns)
        else:
            _checks.count(name, "k", k, 0)
            most = min(k, columns)
        kept = num_sink_blocks + (grid.most_diagonal if force_diagonal else 0)
        width = max(most, min(kept, columns))

        if operators.take(scores, ranked=columns):
            return cls._on(
                grid,
                *operators.topk(
                    scores,
                    places,
                    most,
                    width,
                    *grid.block_size,
                    grid.lengths[0],
                    min(num_sink_blocks, columns),
                    is_causal,
                    force_diagonal,
                ),
            )
        if places is None:
            places = scores.new_full((1, 1, 1), most, dtype=torch.int32).expand(scores.shape[:3])
        forced, live = forced_and_live(
            grid,
            scores.device,
            is_causal=is_causal,
            force_diagonal=force_diagonal,
            num_sink_blocks=num_sink_blocks,
        )
        return cls._on(grid, *lists.topk(scores, places, most, forced, live, width))

    @classmethod
    def from_scores_threshold(
        cls,
        scores: Float[Tensor, "batch heads rows columns"],
        threshold: float | Shaped[Tensor, "..."],
        block_size: BlockSize = (64, 64),
        *,
        is_causal: bool = False,
        force_diagonal: bool = True,
        num_sink_blocks: int = 0,
        seq_lengths: Lengths = None,
    ) -> "BlockLayout":
        """The blocks with ``scores > threshold``, shape ``(B, H, nq, nk)``, and the forced ones.

        ``threshold`` is a number or a tensor that broadcasts to the shape of ``scores``. Which
        blocks are forced and which may compete is that of :meth:`from_scores_topk`. For a gate,
        the scores are the softmax of its logits, with thresholds around 5e-4 to 5e-3.
        """
        name = f"{_NAME}.from_scores_threshold"
        grid, scores = check_scores(name, scores, block_size, seq_lengths, num_sink_blocks)
        if isinstance(threshold, Tensor):
            check_broadcasts(name, "threshold", threshold, scores.shape)
            _checks.same_device(name, scores=scores, threshold=threshold)
        else:
            _checks.number(name, "threshold", threshold)
            if math.isnan(threshold):
                raise _checks.bad_value(name, "threshold", "a number or infinite", threshold)
        forced, live = forced_and_live(
            grid,
            scores.device,
            is_causal=is_causal,
            force_diagonal=force_diagonal,
            num_sink_blocks=num_sink_blocks,
        )
        eligible = (scores > -torch.inf) & live
        return cls._of_mask(grid, forced | eligible & (scores > threshold))

    @classmethod
    def from_window(
        cls,
        seq_lengths: tuple[int, int],
        block_size: BlockSize = (64, 64),
        *,
        left: int | Sequence[int | None] | None = None,
        right: int | Sequence[int | None] | None = None,
        num_sink_blocks: int | Sequence[int] = 0,
        global_blocks: Iterable[int] = (),
        is_causal: bool = False,
        device: torch.device | str | None = None,
    ) -> "BlockLayout":
        """A band of blocks around the diagonal, with sinks and global blocks.

        Row ``i`` keeps the blocks from ``left`` before its first diagonal block to ``right`` after
        its last one (None: no bound), the first ``num_sink_blocks``, and ``global_blocks``, whose
        rows keep everything. With ``is_causal``, only live blocks. Sequences have a number for each
        head. The shape is ``(1, H, nq, nk)``, with ``H = 1`` if there is no sequence.
        """
        name = f"{_NAME}.from_window"
        lengths = pair(name, "seq_lengths", seq_lengths, 0)
        size = block_pair(name, block_size)
        rows, columns = map(ceil_div, lengths, size)
        grid = Grid(rows, columns, size, lengths)
        lefts, rights, sinks = per_head(
            name, left=left, right=right, num_sink_blocks=num_sink_blocks
        )
        if is_causal:
            rights = [0] * len(rights)  # what follows the last diagonal block is not live
        marked = sorted(set(global_blocks))
        for block in marked:
            _checks.integer(name, "global_blocks", block)
            if not 0 <= block < max(rows, columns):
                accepted = f"from 0 to below {max(rows, columns)}"
                raise _checks.bad_value(name, "global_blocks", accepted, block)

        first_diagonal, last_diagonal = grid.diagonal(device)
        first = (first_diagonal - _column(lefts, device)).clamp_min(0)
        stop = (last_diagonal + 1 + _column(rights, device)).clamp_max(columns)
        width = max(lefts) + max(rights) + grid.most_diagonal
        if marked:
            whole = torch.isin(
                torch.arange(rows, device=device), torch.tensor(marked, device=device)
            )
            first, stop = first.masked_fill(whole, 0), stop.masked_fill(whole, columns)
            width = columns
        layout = cls._of_intervals(grid, first, stop, min(width, columns))
        if any(sinks):
            stop = _column(sinks, device).clamp_max(columns).expand(-1, rows)
            width = min(max(sinks), columns)
            layout |= cls._of_intervals(grid, torch.zeros_like(stop), stop, width)
        held = [block for block in marked if block < columns]
        if held:
            indices = torch.tensor(held, device=device).expand(1, 1, rows, -1)
            layout |= cls._on(grid, torch.full_like(indices[..., 0], len(held)), indices)
        return layout.trim_causal() if is_causal else layout

    @classmethod
    def from_documents(
        cls,
        document_ids: Integer[Tensor, "batch length"],
        block_size: BlockSize = (64, 64),
        *,
        is_causal: bool = False,
    ) -> "BlockLayout":
        """The blocks in which some query and some key belong to the same document.

        ``document_ids`` is an integer tensor of shape ``(B, L)``, equal numbers anywhere in a
        sequence being one document; the shape is ``(B, 1, nq, nk)``. With ``is_causal``, only live
        blocks. Inside of an active block nothing is masked: its queries attend to other documents'
        keys too.
        """
        name = f"{_NAME}.from_documents"
        check_integers(name, "document_ids", document_ids)
        if document_ids.dim() != 2:
            raise _checks.bad_value(name, "document_ids", "of shape (B, L)", document_ids)
        batch, length = document_ids.shape
        size = block_pair(name, block_size)
        found, number = torch.unique(document_ids.long(), return_inverse=True)
        position = torch.arange(length, device=document_ids.device)

        def members(block: int) -> Tensor:
            blocks = ceil_div(length, block)
            place = position // block * len(found) + number
            table = torch.zeros(batch, blocks * len(found), device=document_ids.device)
            return table.scatter_(1, place, 1.0).reshape(batch, blocks, len(found))

        mask = (members(size[0]) @ members(size[1]).mT > 0)[:, None]
        grid = Grid(mask.shape[2], mask.shape[3], size, (length, length))
        layout = cls._of_mask(grid, mask)
        return layout.trim_causal() if is_causal else layout

    @classmethod
    def from_flex(cls, block_mask: BlockMask, *, partial: str = "error") -> "BlockLayout":
        """The full and partial blocks of FlexAttention's ``BlockMask``, with its lengths.

        What ``mask_mod`` hides inside of partial blocks is not part of a layout: ``"error"``
        refuses them, ``"keep"`` makes them active. With ``is_causal`` in the attention's call a
        causal mask is recovered.
        """
        name = f"{_NAME}.from_flex"
        if not isinstance(block_mask, BlockMask):
            raise _checks.bad_type(name, "block_mask", "a BlockMask", block_mask)
        _checks.one_of(name, "partial", partial, ("error", "keep"))
        if partial == "error" and block_mask.kv_num_blocks.any():
            raise ValueError(
                f"{name}: block_mask must have no partial blocks with partial='error', got "
                f"{int(block_mask.kv_num_blocks.sum())}"
            )
        size, lengths = block_mask.BLOCK_SIZE, block_mask.seq_lengths

        def layout(counts: Tensor, indices: Tensor) -> BlockLayout:
            missing = (None,) * (4 - indices.dim())
            blocks = ceil_div(lengths[1], size[1])
            return cls.from_indices(
                indices[missing], counts[missing], blocks, size, seq_lengths=lengths
            )

        result = layout(block_mask.kv_num_blocks, block_mask.kv_indices)
        if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
            result |= layout(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        return result

    @classmethod
    def cat(cls, layouts: Sequence["BlockLayout"], dim: int) -> "BlockLayout":
        """Join layouts along the batch (``dim=0``) or the heads (``dim=1``)."""
        name = f"{_NAME}.cat"
        _checks.one_of(name, "dim", dim, (0, 1))
        if not layouts:
            raise _checks.bad_value(name, "layouts", "at least one layout", layouts)
        first, *others = layouts
        for layout in layouts:
            if not isinstance(layout, BlockLayout):
                raise _checks.bad_type(name, "layouts", "BlockLayouts", layout)
        for layout in others:
            sizes, expected = list(layout.shape), list(first.shape)
            sizes[dim] = expected[dim]
            if (sizes, layout.block_size, layout.seq_lengths, layout.device) != (
                expected,
                first.block_size,
                first.seq_lengths,
                first.device,
            ):
                raise ValueError(
                    f"{name}: layouts must agree in device, block size, lengths and sizes but that "
                    f"of dim={dim}, got {first._describe()} and {layout._describe()}"
                )
        width = max(layout.kv_indices.shape[-1] for layout in layouts)
        padded = [F.pad(x.kv_indices, (0, width - x.kv_indices.shape[-1])) for x in layouts]
        counts = torch.cat([layout.kv_num_blocks for layout in layouts], dim)
        return cls._on(first._grid, counts, torch.cat(padded, dim))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(B, H, nq, nk)``."""
        batch, heads, rows = self.kv_num_blocks.shape
        return batch, heads, rows, self.num_kv_blocks

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.kv_num_blocks.device

    @property
    def q_num_blocks(self) -> Int32[Tensor, "batch heads columns"]:
        """The number of active blocks of each column, shape ``(B, H, nk)``."""
        return self._transposed[0]

    @property
    def q_indices(self) -> Int32[Tensor, "batch heads columns width"]:
        """The rows of each column's active blocks, shape ``(B, H, nk, Wt)``, in order."""
        return self._transposed[1]

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor]:
        return lists.transposed(self.kv_num_blocks, self.kv_indices, self.num_kv_blocks)

    def to_dense(self) -> Bool[Tensor, "batch heads rows columns"]:
        """Bool of shape ``(B, H, nq, nk)``, True at the active blocks."""
        return lists.dense(self.kv_num_blocks, self.kv_indices, self.num_kv_blocks)

    def to_elements(
        self, query_length: int | None = None, key_length: int | None = None
    ) -> Bool[Tensor, "batch heads queries keys"]:
        """Bool of shape ``(B, H, Lq, Lk)``, True at the pairs of active blocks.

        The lengths are ``seq_lengths``, or where that is None those of whole blocks by default.
        """
        name = f"{_NAME}.to_elements"
        queries, keys = self._grid.lengths
        queries = queries if query_length is None else query_length
        keys = keys if key_length is None else key_length
        rows, columns = self.shape[2:]
        grid = Grid.checked(name, rows, columns, self.block_size, (queries, keys))
        if self.seq_lengths is not None and grid.seq_lengths != self.seq_lengths:
            raise ValueError(
                f"{name}: lengths must be those of the layout, {self.seq_lengths}, "
                f"got {grid.seq_lengths}"
            )
        row, column = (
            torch.arange(length, device=self.device) // block
            for length, block in zip((queries, keys), self.block_size, strict=True)
        )
        return self.to_dense()[:, :, row[:, None], column]

    def to_flex(self, *, is_causal: bool = False, num_heads: int | None = None) -> BlockMask:
        """FlexAttention's ``BlockMask`` of the same pairs, ``kv_idx <= q_idx`` with ``is_causal``.

        ``num_heads`` repeats each of the layout's heads in place, as grouped queries need it.
        Blocks without a hidden pair are full, also where they are short.
        """
        name = f"{_NAME}.to_flex"
        heads = self.shape[1]
        if num_heads is not None:
            _checks.integer(name, "num_heads", num_heads)
            if heads == 0 or num_heads < 1 or num_heads % heads:
                accepted = f"a multiple of the layout's {heads} heads"
                raise _checks.bad_value(name, "num_heads", accepted, num_heads)
        return flex.block_mask(
            self.to_dense(),
            self.kv_indices,
            self.kv_num_blocks,
            self._grid,
            is_causal=is_causal,
            group=1 if num_heads is None else num_heads // heads,
        )

    def density(self, *, is_causal: bool = False) -> Float[Tensor, ""]:
        """The part of the blocks that is active, a float32 scalar; nan where there are none.

        With ``is_causal``, of the live blocks.
        """
        batch, heads, rows, columns = self.shape
        if not is_causal:
            return self.kv_num_blocks.sum().float() / (batch * heads * rows * columns)
        live = (self._grid.diagonal(self.device)[1] + 1).clamp_max(columns).sum()
        return self.trim_causal().kv_num_blocks.sum().float() / (batch * heads * live)

    def trim_causal(self) -> "BlockLayout":
        """The live blocks alone."""
        last_diagonal = self._grid.diagonal(self.device)[1]
        counts = lists.count_up_to(last_diagonal[:, None], self.kv_indices, self.kv_num_blocks)
        return replace(self, kv_num_blocks=counts)

    def __or__(self, other: "BlockLayout") -> "BlockLayout":
        """The blocks of either layout; sizes of 1 of batch and heads broadcast."""
        if not isinstance(other, BlockLayout):
            return NotImplemented
        grid, merged = self._merged(other, "|")
        keep = merged < grid.columns
        keep[..., 1:] &= merged.diff(dim=-1) > 0
        return self._of_kept(grid, merged, keep, min(merged.shape[-1], grid.columns))

    def __and__(self, other: "BlockLayout") -> "BlockLayout":
        """The blocks of both layouts; sizes of 1 of batch and heads broadcast."""
        if not isinstance(other, BlockLayout):
            return NotImplemented
        grid, merged = self._merged(other, "&")
        keep = (merged[..., 1:] < grid.columns) & (merged.diff(dim=-1) == 0)
        width = min(self.kv_indices.shape[-1], other.kv_indices.shape[-1])
        return self._of_kept(grid, merged[..., 1:], keep, width)

    def to(self, device: torch.device | str) -> "BlockLayout":
        """The layout on a device, with the transposed lists if they exist."""
        moved = replace(
            self,
            kv_num_blocks=self.kv_num_blocks.to(device),
            kv_indices=self.kv_indices.to(device),
        )
        if "_transposed" in self.__dict__:
            moved.__dict__["_transposed"] = tuple(t.to(device) for t in self._transposed)
        return moved

    def plot(self, batch: int = 0, head: int = 0, *, ax: Any = None) -> Any:
        """Draw one head's active blocks with matplotlib, on ``ax`` or new axes; returns the Axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        name = f"{_NAME}.plot"
        for argument, index, size in (("batch", batch, 0), ("head", head, 1)):
            _checks.integer(name, argument, index)
            if not 0 <= index < self.shape[size]:
                accepted = f"from 0 to below {self.shape[size]}"
                raise _checks.bad_value(name, argument, accepted, index)
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError(
                f"{name}: needs matplotlib: pip install 'tilework[bench]' ({error})"
            ) from error
        if ax is None:
            ax = pyplot.subplots()[1]
        picture = replace(
            self,
            kv_num_blocks=self.kv_num_blocks[batch, head][None, None],
            kv_indices=self.kv_indices[batch, head][None, None],
        )
        ax.imshow(
            picture.to_dense()[0, 0].cpu().numpy(),
            cmap="Greys",
            vmin=0,
            vmax=1,
            interpolation="nearest",
            aspect=self.block_size[0] / self.block_size[1],
        )
        bq, bk = self.block_size
        ax.set(
            xlabel=f"block of {bk} keys",
            ylabel=f"block of {bq} queries",
            title=f"batch {batch}, head {head}, density {picture.density():.3g}",
        )
        return ax

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        if (self.shape, self.block_size, self.seq_lengths) != (
            other.shape,
            other.block_size,
            other.seq_lengths,
        ):
            return False
        other = other.to(self.device)
        if not torch.equal(self.kv_num_blocks, other.kv_num_blocks):
            return False
        width = min(self.kv_indices.shape[-1], other.kv_indices.shape[-1])
        ours, theirs = (layout._or_sentinel()[..., :width] for layout in (self, other))
        return torch.equal(ours, theirs)

    def __repr__(self) -> str:
        return f"{_NAME}({self._describe()}, density={self.density():.3g})"

    def _describe(self) -> str:
        text = f"shape={self.shape}, block_size={self.block_size}"
        return text if self.seq_lengths is None else f"{text}, seq_lengths={self.seq_lengths}"

    @classmethod
    def _on(cls, grid: Grid, counts: Tensor, indices: Tensor) -> "BlockLayout":
        counts, indices = counts.int().contiguous(), indices.int().contiguous()
        return cls(counts, indices, grid.columns, grid.block_size, grid.seq_lengths)

    @classmethod
    def _of_kept(cls, grid: Grid, values: Tensor, keep: Tensor, width: int) -> "BlockLayout":
        """Of increasing columns with repetitions, those to keep; at most ``width`` in a row."""
        counts, places = lists.positions(keep, width)
        # What stands after the counts may be anything.
        places = places.clamp(0, max(values.shape[-1] - 1, 0)).long()
        return cls._on(grid, counts, values.gather(-1, places))

    @classmethod
    def _of_mask(cls, grid: Grid, mask: Tensor) -> "BlockLayout":
        return cls._on(grid, *lists.positions(mask, None))

    @classmethod
    def _of_intervals(cls, grid: Grid, first: Tensor, stop: Tensor, width: int) -> "BlockLayout":
        """Rows of consecutive blocks, shape ``(H, nq)``, at most ``width`` of them."""
        indices = first[..., None] + torch.arange(width, device=first.device)
        return cls._on(grid, (stop - first).clamp_min(0)[None], indices[None])

    @property
    def _grid(self) -> Grid:
        rows, columns = self.shape[2:]
        return Grid(rows, columns, self.block_size, self.seq_lengths)

    def _or_sentinel(self) -> Tensor:
        """``kv_indices`` with the number of columns where nothing may be read."""
        return lists.or_sentinel(self.kv_num_blocks, self.kv_indices, self.num_kv_blocks)

    def _merged(self, other: "BlockLayout", operation: str) -> tuple[Grid, Tensor]:
        """Both layouts' columns in order, and the grid that they share."""
        name = f"{_NAME}.{operation}"
        pairs = list(zip(self.shape[:2], other.shape[:2], strict=True))
        lengths = {self.seq_lengths, other.seq_lengths} - {None}
        if (
            self.shape[2:] != other.shape[2:]
            or self.block_size != other.block_size
            or len(lengths) > 1
            or any(a != b and 1 not in (a, b) for a, b in pairs)
        ):
            raise ValueError(
                f"{name}: layouts must have the same blocks and lengths, and batch and heads that "
                f"broadcast, got {self._describe()} and {other._describe()}"
            )
        _checks.same_device(name, left=self.kv_indices, right=other.kv_indices)
        grid = replace(self._grid, seq_lengths=next(iter(lengths), None))
        batch, heads = (b if a == 1 else a for a, b in pairs)
        both = [layout._or_sentinel().expand(batch, heads, -1, -1) for layout in (self, other)]
        return grid, torch.cat(both, -1).sort(dim=-1).values


def _column(values: Sequence[int], device: torch.device | str | None) -> Tensor:
    return torch.tensor(values, device=device)[:, None]
