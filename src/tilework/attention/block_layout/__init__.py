"""Which blocks of keys each block of queries attends to, as compact index lists."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Integer, Shaped
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tilework import _checks
from tilework.attention.block_layout import flex, operators, patterns, plot, sets
from tilework.attention.block_layout.checks import (
    BlockSize,
    block_pair,
    check_broadcasts,
    check_grid,
    check_integers,
    check_lists,
    check_places,
    check_scores,
    grid_of,
    pair,
    per_head,
)
from tilework.attention.block_layout.common import (
    Grid,
    Lengths,
    Lists,
    TopK,
    ceil_div,
    count_up_to,
    forced_and_live,
    longest,
    or_sentinel,
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

    What waits for a CUDA device stands on the page on gates.

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
    _columns: Lists | None = field(default=None, init=False)

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
        grid, lists = check_lists(
            name, kv_indices, kv_num_blocks, num_kv_blocks, block_size, seq_lengths
        )
        return cls._on(grid, *lists)

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
            most = min(max(longest(places, columns), 0), columns)
        else:
            _checks.count(name, "k", k, 0)
            most = min(k, columns)
        kept = num_sink_blocks + (grid.most_diagonal if force_diagonal else 0)
        width = max(most, min(kept, columns))
        given = TopK(
            scores,
            places,
            most,
            width,
            *grid.block_size,
            grid.lengths[0],
            min(num_sink_blocks, columns),
            is_causal,
            force_diagonal,
        )
        return cls._on(grid, *operators.topk(given))

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
            grid, scores.device, num_sink_blocks, is_causal, force_diagonal
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

        layout = cls._on(grid, *patterns.window(grid, lefts, rights, sinks, marked, device))
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
        size, length = block_pair(name, block_size), document_ids.shape[1]
        mask = patterns.documents(document_ids, size)
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
        parts = flex.parts(name, block_mask, partial)
        size, lengths = block_mask.BLOCK_SIZE, block_mask.seq_lengths
        columns = ceil_div(lengths[1], size[1])
        layouts = (
            cls.from_indices(indices, counts, columns, size, seq_lengths=lengths)
            for counts, indices in parts
        )
        return reduce(or_, layouts)

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

    @property
    def _transposed(self) -> Lists:
        # No cached_property: the compiler does not know the lock that it takes before Python 3.12.
        found = self._columns
        if found is None:
            found = operators.transposed(*self._lists, self.num_kv_blocks)
            if type(found.counts) is type(self.kv_num_blocks):  # not what a trace makes of these
                object.__setattr__(self, "_columns", found)
        return found

    def to_dense(self) -> Bool[Tensor, "batch heads rows columns"]:
        """Bool of shape ``(B, H, nq, nk)``, True at the active blocks."""
        return operators.dense(*self._lists, self.num_kv_blocks)

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
        grid = check_grid(name, rows, columns, self.block_size, (queries, keys))
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
            *self._lists,
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
        counts = count_up_to(last_diagonal[:, None], *self._lists)
        return replace(self, kv_num_blocks=counts)

    def __or__(self, other: "BlockLayout") -> "BlockLayout":
        """The blocks of either layout; sizes of 1 of batch and heads broadcast."""
        if not isinstance(other, BlockLayout):
            return NotImplemented
        grid = self._shared_grid(other, "|")
        return self._on(grid, *sets.union(self._lists, other._lists, grid.columns))

    def __and__(self, other: "BlockLayout") -> "BlockLayout":
        """The blocks of both layouts; sizes of 1 of batch and heads broadcast."""
        if not isinstance(other, BlockLayout):
            return NotImplemented
        grid = self._shared_grid(other, "&")
        return self._on(grid, *sets.intersection(self._lists, other._lists, grid.columns))

    def to(self, device: torch.device | str) -> "BlockLayout":
        """The layout on a device, with the transposed lists if they exist."""
        moved = replace(
            self,
            kv_num_blocks=self.kv_num_blocks.to(device),
            kv_indices=self.kv_indices.to(device),
        )
        if self._columns is not None:
            columns = Lists(*(t.to(device) for t in self._columns))
            object.__setattr__(moved, "_columns", columns)
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
        picture = replace(
            self,
            kv_num_blocks=self.kv_num_blocks[batch, head][None, None],
            kv_indices=self.kv_indices[batch, head][None, None],
        )
        title = f"batch {batch}, head {head}, density {picture.density():.3g}"
        return plot.draw(name, picture.to_dense()[0, 0], self.block_size, title, ax)

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
        ours, theirs = (
            or_sentinel(*layout._lists, layout.num_kv_blocks)[..., :width]
            for layout in (self, other)
        )
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
    def _of_mask(cls, grid: Grid, mask: Tensor) -> "BlockLayout":
        return cls._on(grid, *operators.positions(mask, None))

    @property
    def _lists(self) -> Lists:
        return Lists(self.kv_num_blocks, self.kv_indices)

    @property
    def _grid(self) -> Grid:
        rows, columns = self.shape[2:]
        return Grid(rows, columns, self.block_size, self.seq_lengths)

    def _shared_grid(self, other: "BlockLayout", operation: str) -> Grid:
        """The grid of both layouts; refuse what does not fit together."""
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
        return replace(self._grid, seq_lengths=next(iter(lengths), None))
