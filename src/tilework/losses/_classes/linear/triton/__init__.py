"""The statistics of a linear head's logits on the GPU, and their gradients: launchers of kernels.

Forward: a program takes a block of tokens and a share of the classes; a second kernel merges the
shares. Backward: a kernel writes the gradient of a panel of logits, and the library's matrix
products turn it into gradients of input and weight.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from tilework import _triton
from tilework._operators import Gradients, Needed
from tilework.losses._classes import kernels
from tilework.losses._classes.kernels import Head, Panel, Upstream, contiguous, precision
from tilework.losses._classes.linear.common import LinearStats
from tilework.losses._classes.linear.triton import filter
from tilework.losses._classes.linear.triton.statistics import (
    BACKWARD,
    FORWARD,
    FORWARD_MORE,
    Shares,
    backward_kernel,
    forward_kernel,
    merge_kernel,
)
from tilework.losses._classes.statistics import Statistics, empty, of_wanted
from tilework.losses._classes.tiles import filter_scale


def forward(given: LinearStats) -> Statistics:
    """See :class:`Statistics`."""
    head = Head.of(given.input, given.linear_weight, given.linear_bias, given.softcap)
    num_tokens, num_classes = len(head.input), len(head.weight)
    results = empty(given.input, given.target, given.squares, given.moments)
    if num_tokens == 0:
        return results
    share = max(kernels.SHARE, triton.cdiv(num_classes, kernels.MAX_SHARES))
    num_shares = triton.cdiv(num_classes, share)
    table = FORWARD_MORE if given.squares or given.moments else FORWARD
    config = table.choose(_triton.architecture(given.input.device), given.input.dtype)
    target, class_weight = given.target.contiguous(), contiguous(given.class_weight)

    def room(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return target.new_empty(num_shares, num_tokens, dtype=dtype) if wanted else None

    peak, total = target.new_empty(2, num_shares, num_tokens, dtype=torch.float32)
    shares = Shares(
        peak,
        total,
        room(class_weight is not None),
        room(given.squares),
        room(given.moments),
        room(given.moments),
        room(given.moments, torch.int64),
    )
    target_logit = torch.full_like(results.shift, torch.nan)
    share_weight = None
    if class_weight is not None:
        padded = F.pad(class_weight, (0, num_shares * share - num_classes))
        share_weight = padded.view(num_shares, share).sum(1)
    forward_kernel[(triton.cdiv(num_tokens, config.block_rows), num_shares)](
        head,
        target,
        class_weight,
        target_logit,
        shares,
        (num_tokens, num_classes, share),
        1 / given.temperature,
        given.ignore_index,
        PRECISION=precision(),
        INTERPRETED=_triton.INTERPRETED,
        **config.arguments(),
    )
    merge_kernel[(triton.cdiv(num_tokens, 128),)](
        target,
        target_logit,
        share_weight,
        shares,
        results,
        num_tokens,
        num_shares,
        given.ignore_index,
        BLOCK_ROWS=128,
    )
    return results


def backward(
    given: LinearStats, results: Statistics, grads: Statistics, needed: Needed
) -> Gradients:
    """Gradients of the head.

    With ``gradient_filter``, tiles whose gradients are small in every row are left out of the
    products for input and weight. Classes are taken in the order of their mean logits, so that
    small gradients share tiles.
    """
    grads = of_wanted(grads, given.squares, given.moments)
    head = Head.of(given.input, given.linear_weight, given.linear_bias, given.softcap)
    input, linear_weight, linear_bias = head.input, head.weight, head.bias
    num_tokens, num_features = input.shape
    num_classes = len(linear_weight)
    of_input, of_weight, of_bias = (
        name in needed for name in ("input", "linear_weight", "linear_bias")
    )
    config = BACKWARD.choose(_triton.architecture(input.device), input.dtype)
    gradient_filter = given.gradient_filter
    if not (of_input or of_weight):
        gradient_filter = None  # the bias is no product
    filters = gradient_filter is not None
    tile = config.block_rows, config.block_columns
    target, ignore_index = given.target, given.ignore_index
    # Ignored rows have no gradient, and their hidden states are never read.
    ignored = target == ignore_index
    hidden = input.masked_fill(ignored[:, None], 0) if of_weight or filters else input
    order = None
    if filters:
        order = filter.by_mean_logit(hidden, ignored, linear_weight, linear_bias)
        target, ignore_index = filter.places(target, ignored, order), filter.IGNORED
    tokens = max(1, min(num_tokens, kernels.PANEL_TOKENS))
    classes = min(num_classes, kernels.PANEL_CLASSES)
    buffer = input.new_empty(tokens * classes)

    def numbers(size: int, wanted: bool) -> Tensor | None:
        return input.new_empty(size, dtype=torch.float32) if wanted else None

    column_sums = numbers(triton.cdiv(tokens, config.block_rows) * classes, of_bias)
    masses = numbers(triton.cdiv(classes, config.block_columns) * tokens, filters)
    target = target.contiguous()
    upstream = Upstream.of(results.shift, grads, given.class_weight)
    of_total = torch.zeros_like(results.total) if grads.total is None else grads.total
    scale = filter_scale(of_total, upstream.moment, results.total)
    left = torch.zeros_like(scale)

    grad_input = input.new_zeros(input.shape if of_input else 0, dtype=torch.float32)
    grad_weight = input.new_empty(linear_weight.shape if of_weight else 0)
    grad_bias = input.new_zeros(num_classes if of_bias else 0, dtype=torch.float32)
    for first_class in range(0, num_classes, classes):
        panel_classes = slice(first_class, min(first_class + classes, num_classes))
        width = panel_classes.stop - panel_classes.start
        members = panel_classes if order is None else order[panel_classes]
        weight = linear_weight[members]
        bias = None if linear_bias is None else linear_bias[members]
        class_weight = given.class_weight
        if class_weight is not None:
            class_weight = class_weight[members].contiguous()
        weight_tile = input.new_zeros(
            (width, num_features) if of_weight else 0, dtype=torch.float32
        )
        for first_token in range(0, num_tokens, tokens):
            panel_tokens = slice(first_token, min(first_token + tokens, num_tokens))
            height = panel_tokens.stop - panel_tokens.start
            gradient = buffer[: height * width].view(height, width)
            row_blocks = triton.cdiv(height, config.block_rows)
            backward_kernel[(row_blocks * triton.cdiv(width, config.block_columns),)](
                Head.of(input[panel_tokens], weight, bias, given.softcap),
                target[panel_tokens],
                class_weight,
                upstream.at(panel_tokens),
                Panel(gradient, column_sums, (height, width)),
                masses,
                first_class,
                1 / given.temperature,
                ignore_index,
                PRECISION=precision(),
                INTERPRETED=_triton.INTERPRETED,
                GROUP=8,
                **config.arguments(),
            )
            kept = None
            if gradient_filter is not None and masses is not None:
                kept = filter.kept_tiles(
                    masses,
                    scale[panel_tokens],
                    left[panel_tokens],
                    width,
                    gradient_filter / num_classes,
                    config,
                )
            if of_input:
                filter.add_product(grad_input[panel_tokens], gradient, weight, kept, config, tile)
            if of_weight:
                transposed = None if kept is None else kept.T
                rows = hidden[panel_tokens]
                filter.add_product(weight_tile, gradient.T, rows, transposed, config, tile[::-1])
            if column_sums is not None:
                partials = column_sums[: row_blocks * width].view(row_blocks, width)
                grad_bias[members] += partials.sum(0)
        if of_weight:
            grad_weight[members] = weight_tile.to(grad_weight.dtype)
    return {
        "input": grad_input.to(input.dtype),
        "linear_weight": grad_weight,
        "linear_bias": grad_bias.to(input.dtype),
    }
