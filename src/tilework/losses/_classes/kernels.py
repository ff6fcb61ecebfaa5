"""What the kernels have in common: statistics of tiles, outputs of heads, panels of gradients."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilework import _triton
from tilework.losses._classes.statistics import Statistics
from tilework.losses._classes.tiles import accumulate, slices

# Classes per share at least, and shares at most: statistics of a share are 12 bytes per token.
SHARE = 2048
MAX_SHARES = 64
# A panel of logit gradients: 64 MiB in half precision.
PANEL_TOKENS = 8192
PANEL_CLASSES = 4096


class Head(NamedTuple):
    """A linear head as kernels take it: inputs, weight and bias with their strides, and options."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    features: int
    input_strides: tuple[int, ...]
    weight_strides: tuple[int, ...]
    bias_stride: int
    softcap: float | None

    @classmethod
    def of(
        cls, input: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
    ) -> "Head":
        """Copy what the kernels could not address."""
        input, weight = short_strides(input), short_strides(weight)
        strides = input.stride(), weight.stride(), 0 if bias is None else bias.stride(0)
        return cls(input, weight, bias, input.shape[1], *strides, softcap)


@triton.jit
def outputs(
    head,
    first_row,
    first_column,
    num_rows,
    num_columns,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """A tile of a head's outputs, in float32, from a row and a column, of so many at most.

    Rows and columns past the end repeat the last ones. Offsets within a tile fit 32 bits, which
    the launcher sees to; the pointers move in 64 bits.
    """
    last_row = tl.minimum(num_rows, BLOCK_ROWS).to(tl.int32) - 1
    last_column = tl.minimum(num_columns, BLOCK_COLUMNS).to(tl.int32) - 1
    rows = tl.minimum(tl.arange(0, BLOCK_ROWS), last_row)
    columns = tl.minimum(tl.arange(0, BLOCK_COLUMNS), last_column)
    inner = tl.arange(0, BLOCK_INNER)
    input_ptr = head.input + first_row * head.input_strides[0]
    weight_ptr = head.weight + first_column * head.weight_strides[0]
    input_offsets = rows[:, None] * head.input_strides[0] + inner[None, :] * head.input_strides[1]
    weight_offsets = (
        columns[None, :] * head.weight_strides[0] + inner[:, None] * head.weight_strides[1]
    )
    outputs = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(0, head.features, BLOCK_INNER):
        left = inner < head.features - start
        hidden = tl.load(input_ptr + input_offsets, mask=left[None, :], other=0.0)
        weight = tl.load(weight_ptr + weight_offsets, mask=left[:, None], other=0.0)
        outputs = _triton.dot(hidden, weight, outputs, PRECISION, INTERPRETED)
        input_ptr += BLOCK_INNER * head.input_strides[1]
        weight_ptr += BLOCK_INNER * head.weight_strides[1]
    if head.bias is not None:
        bias_ptr = head.bias + first_column * head.bias_stride
        outputs += tl.load(bias_ptr + columns * head.bias_stride).to(tl.float32)[None, :]
    return outputs


class Panel(NamedTuple):
    """A panel of gradients of outputs, the sums of its columns over blocks of rows, and its size.

    The sums are None where nobody needs them.
    """

    gradient: Tensor
    column_sums: Tensor | None
    sizes: tuple[int, int]


@triton.jit
def grouped_tile(
    sizes,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The row and column of blocks of a matrix that is this program's tile.

    Programs walk in groups of ``GROUP`` blocks of rows, so that they share blocks of the weight in
    the cache.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(sizes[0], BLOCK_ROWS)
    column_blocks = tl.cdiv(sizes[1], BLOCK_COLUMNS)
    group = program // (GROUP * column_blocks)
    group_rows = tl.minimum(row_blocks - group * GROUP, GROUP)
    place = program % (GROUP * column_blocks)
    row_block = group * GROUP + place % group_rows
    return row_block.to(tl.int64), (place // group_rows).to(tl.int64)


@triton.jit
def store_panel(
    panel,
    grad,
    row_block,
    column_block,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write a tile of a panel of gradients, and the sums of its columns where there is a place."""
    num_rows, num_columns = panel.sizes
    first_row, first_column = row_block * BLOCK_ROWS, column_block * BLOCK_COLUMNS
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    row_mask, column_mask = row < num_rows - first_row, column < num_columns - first_column
    if panel.column_sums is not None:
        sums_ptr = panel.column_sums + row_block * num_columns + first_column
        tl.store(sums_ptr + column, tl.sum(grad, 0), mask=column_mask)
    panel_ptr = panel.gradient + first_row * num_columns + first_column
    tl.store(
        panel_ptr + row[:, None] * num_columns + column[None, :],
        grad.to(panel_ptr.dtype.element_ty),
        mask=row_mask[:, None] & column_mask[None, :],
    )


# The exponential of its negative is 0, and so is its product with that.
NEGLIGIBLE_GAP = tl.constexpr(1000.0)


@triton.jit
def add_tile(
    logits,
    inside,
    is_target,
    weights,
    peak,
    base,
    total,
    gap,
    weight_seen,
    squares,
    moment,
    NEED_SQUARES: tl.constexpr,
    NEED_MOMENT: tl.constexpr,
):
    """Running statistics of rows, with a tile of logits more; ``weights`` may be None.

    With the peak ``m`` of the logits ``z`` so far and that of the next tile, ``m'``: the total is
    ``t' = t * exp(m - m') + sum(exp(z - m'))``, the class gap ``g' = g + (m' - m) * w - sum(w_v *
    (z_v - m'))`` with ``w`` the sum of the weights before, and the moment ``(s + (m' - m) * t) *
    exp(m - m') + sum(exp(z - m') * (m' - z))``.
    """
    if NEED_SQUARES:
        squares += tl.sum(tl.where(inside & ~is_target, logits * logits, 0.0), 1)
    new_peak = tl.maximum(peak, tl.max(tl.where(inside, logits, float("-inf")), 1))
    # A row of -inf alone has no finite peak to subtract.
    new_base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    logits -= new_base[:, None]
    if weights is not None:
        weighted = tl.where(inside, logits * weights[None, :], 0.0)
        gap += (new_base - base) * weight_seen - tl.sum(weighted, 1)
        weight_seen += tl.sum(weights, 0)
    exponentials = tl.where(inside, tl.exp(logits), 0.0)
    decay = tl.exp(peak - new_base)
    if NEED_MOMENT:
        # A gap of infinity would make nan of a product that is zero.
        gaps = tl.minimum(-logits, NEGLIGIBLE_GAP)
        moment = (moment + (new_base - base) * total) * decay + tl.sum(exponentials * gaps, 1)
    total = total * decay + tl.sum(exponentials, 1)
    return new_peak, new_base, total, gap, weight_seen, squares, moment


class Upstream(NamedTuple):
    """The shift of each row and the gradients of its statistics; None for those of no use."""

    shift: Tensor
    total: Tensor | None
    target_gap: Tensor | None
    class_gap: Tensor | None
    squares: Tensor | None
    moment: Tensor | None

    @classmethod
    def of(cls, shift: Tensor, grads: Statistics, class_weight: Tensor | None) -> "Upstream":
        """Contiguous, without that of class gaps where there are no weights."""
        class_gap = None if class_weight is None else grads.class_gap
        values = grads.total, grads.target_gap, class_gap, grads.squares, grads.moment
        return cls(shift.contiguous(), *map(contiguous, values))

    def at(self, rows: slice) -> "Upstream":
        """Those of some rows."""
        _, *grads = self
        return Upstream(
            self.shift[rows], *(None if values is None else values[rows] for values in grads)
        )


@triton.jit
def tile_gradient(logits, upstream, rows, kept, is_target, weights):
    """The gradient of a tile of logits from that of its statistics.

    With the upstream gradients ``G`` of the total, ``S`` of the moment, ``T``, ``C`` and ``Q`` of
    target gap, class gap and squares: ``exp(z - shift) * (G + S * (shift - z - 1)) - T [target] -
    C * w + 2 Q z [not target]``.
    """
    shift = tl.load(upstream.shift + rows, mask=kept, other=0.0)
    of_total = tl.zeros_like(shift)
    if upstream.total is not None:
        of_total = tl.load(upstream.total + rows, mask=kept, other=0.0)
    of_target = tl.zeros_like(shift)
    if upstream.target_gap is not None:
        of_target = tl.load(upstream.target_gap + rows, mask=kept, other=0.0)
    grad = tl.exp(logits - shift[:, None])
    if upstream.moment is not None:
        of_moment = tl.load(upstream.moment + rows, mask=kept, other=0.0)
        gaps = tl.minimum(shift[:, None] - logits, NEGLIGIBLE_GAP)
        grad *= of_total[:, None] + of_moment[:, None] * (gaps - 1)
    else:
        grad *= of_total[:, None]
    grad -= tl.where(is_target, of_target[:, None], 0.0)
    if upstream.class_gap is not None:
        of_classes = tl.load(upstream.class_gap + rows, mask=kept, other=0.0)
        grad -= of_classes[:, None] * weights[None, :]
    if upstream.squares is not None:
        of_squares = 2 * tl.load(upstream.squares + rows, mask=kept, other=0.0)
        grad += tl.where(is_target, 0.0, of_squares[:, None] * logits)
    return grad


def panel_gradients(
    hidden: Tensor,
    linear_weight: Tensor,
    needed: Sequence[bool],
    block_rows: int,
    launch: Callable[[slice, slice, Panel], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias; an empty tensor for each that is not needed.

    ``launch`` writes the gradient of the outputs of some tokens and classes to a panel, and for the
    bias its sums over blocks of rows, shape (blocks, classes), in float32.
    """
    num_tokens, num_features = hidden.shape
    num_classes = len(linear_weight)
    tokens = max(1, min(num_tokens, PANEL_TOKENS))
    classes = min(num_classes, PANEL_CLASSES)
    buffer = hidden.new_empty(tokens * classes)
    size = triton.cdiv(tokens, block_rows) * classes if needed[2] else 0
    column_sums = hidden.new_empty(size, dtype=torch.float32)
    grad_hidden = hidden.new_zeros(hidden.shape if needed[0] else 0, dtype=torch.float32)
    grad_weight = hidden.new_empty(linear_weight.shape if needed[1] else 0)
    grad_bias = hidden.new_zeros(num_classes if needed[2] else 0, dtype=torch.float32)
    for of_classes in slices(num_classes, classes):
        width = of_classes.stop - of_classes.start
        weight_shape = (width, num_features) if needed[1] else 0
        weight_tile = hidden.new_zeros(weight_shape, dtype=torch.float32)
        for of_tokens in slices(num_tokens, tokens):
            height = of_tokens.stop - of_tokens.start
            panel = buffer[: height * width].view(height, width)
            row_blocks = triton.cdiv(height, block_rows)
            partials = column_sums[: row_blocks * width].view(-1, width) if needed[2] else None
            launch(of_tokens, of_classes, Panel(panel, partials, (height, width)))
            if needed[0]:
                accumulate(grad_hidden[of_tokens], panel, linear_weight[of_classes])
            if needed[1]:
                accumulate(weight_tile, panel.T, hidden[of_tokens])
            if partials is not None:
                grad_bias[of_classes] += partials.sum(0)
        if needed[1]:
            grad_weight[of_classes] = weight_tile
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias.to(hidden.dtype)


def short_strides(matrix: Tensor) -> Tensor:
    """The matrix, copied if an offset within a tile of 256 x 256 would not fit 32 bits."""
    return matrix.contiguous() if 256 * sum(matrix.stride()) >= 2**31 else matrix


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def precision() -> str:
    """How float32 products are computed: as the user told torch."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
