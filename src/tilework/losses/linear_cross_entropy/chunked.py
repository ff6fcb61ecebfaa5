"""The loss together with its gradients, chunk by chunk of tokens, in plain PyTorch.

A chunk's logits become their own gradients in place, and two more matrix products turn these into
the gradients of input and weight: six operations for each token, feature and class, where computing
the logits again takes eight. The loss must be a sum whose coefficients are known beforehand.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tilework._operators import HALF, computation_dtype
from tilework.losses._classes.tiles import (
    accumulate,
    kept_rows,
    product_dtype,
    slices,
    spread,
)

# Fewer tokens make the products slow, as each reads and writes the whole gradient of the weight.
GPU_TOKENS = 4096
CPU_TOKENS, MIN_CPU_TOKENS = 512, 256
CPU_CHUNK = 128 * 2**20  # bytes that a chunk may have, or a quarter of the weight's if that is more
BLOCK = 2048 * 1024  # logits at a time, which stay in a CPU's last cache


def chunk_tokens(input: Tensor, linear_weight: Tensor) -> int:
    """The tokens of a chunk: all where that takes less than adding up the weight's gradient."""
    tokens, (classes, features) = input.shape[:-1].numel(), linear_weight.shape
    dtype = product_dtype(input)
    size = GPU_TOKENS
    if input.device.type == "cpu":
        most = max(CPU_CHUNK, classes * features * dtype.itemsize // 4)
        size = max(MIN_CPU_TOKENS, min(CPU_TOKENS, most // (classes * dtype.itemsize)))
    if input.dtype in HALF and tokens <= size + 2 * features:
        return tokens
    return min(size, tokens)


def extra_bytes(input: Tensor, linear_weight: Tensor) -> int:
    """The memory beyond the gradients: a chunk, a float32 gradient, a weight cast for products."""
    tokens, dtype = chunk_tokens(input, linear_weight), product_dtype(input)
    size = tokens * linear_weight.shape[0] * dtype.itemsize
    if tokens < input.shape[:-1].numel() and input.dtype in HALF:
        size += 4 * linear_weight.numel()
    if dtype != input.dtype:
        size += dtype.itemsize * linear_weight.numel()
    return size


def loss_and_gradients(
    logit_gradient_: Callable[..., Tensor],
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    target_scale: Tensor,
    class_scale: Tensor | None,
    square_scale: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The summed losses of the kept rows, with the gradients of input, weight and bias.

    The loss of a row is ``target_scale * (lse - z[target]) + class_scale * sum(class_weight *
    (lse - z)) + square_scale * lse**2``. A gradient that is not needed is empty.
    """
    rows, (hidden, kept_target) = kept_rows(target == ignore_index, input, target)
    scales = [
        scale if scale is None or rows is None else scale.index_select(0, rows)
        for scale in (target_scale, class_scale, square_scale)
    ]
    step = max(1, chunk_tokens(hidden, linear_weight))
    product, dtype = product_dtype(hidden), computation_dtype(hidden.dtype)
    weight = linear_weight.to(product)
    one_product = len(hidden) <= step and product == input.dtype

    buffer = hidden.new_empty(min(step, len(hidden)) * len(weight), dtype=product)
    grad_hidden = hidden.new_empty(hidden.shape if needed[0] else 0)
    grad_weight = weight.new_empty(
        weight.shape if needed[1] else 0, dtype=input.dtype if one_product else dtype
    )
    if len(hidden) == 0 or product != grad_weight.dtype:
        grad_weight.zero_()
    grad_bias = weight.new_zeros(len(weight) if needed[2] else 0, dtype=dtype)
    losses = hidden.new_empty(len(hidden), dtype=dtype)
    for tokens in slices(len(hidden), step):
        chunk = hidden[tokens].to(product)
        logits = buffer[: len(chunk) * len(weight)].view(len(chunk), len(weight))
        torch.mm(chunk, weight.T, out=logits)
        losses[tokens] = logit_gradient_(
            logits,
            kept_target[tokens],
            linear_bias,
            class_weight,
            *(None if scale is None else scale[tokens] for scale in scales),
            softcap,
            ignore_index,
            grad_bias if needed[2] else None,
        )
        if needed[0]:
            grad_hidden[tokens] = logits @ weight
        if needed[1] and tokens.start == 0 and product == grad_weight.dtype:
            torch.mm(logits.T, chunk, out=grad_weight)
        elif needed[1]:
            accumulate(grad_weight, logits.T, chunk)
    return (
        losses.sum(),
        spread(grad_hidden, rows, len(input), dim=0) if needed[0] else grad_hidden,
        grad_weight.to(input.dtype),
        grad_bias.to(input.dtype),
    )


def logit_gradient_(
    logits: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    target_scale: Tensor,
    class_scale: Tensor | None,
    square_scale: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    grad_bias: Tensor | None,
) -> Tensor:
    """Turn products into gradients of their losses, in place; add up the bias's; return losses."""
    dtype = computation_dtype(logits.dtype)
    losses = torch.empty_like(target_scale)
    num_classes = logits.shape[1]
    height = min(max(1, BLOCK // num_classes), len(logits))
    scratch = logits.new_empty(0 if logits.dtype == dtype else height * num_classes, dtype=dtype)
    for rows in slices(len(logits), height):
        stored = logits[rows]
        values = stored
        if stored.dtype != dtype:
            values = scratch[: stored.numel()].view_as(stored).copy_(stored)
        if linear_bias is not None:
            values.add_(linear_bias)
        slope = None
        if softcap is not None:
            values.div_(softcap).tanh_()
            slope = 1 - values.square()
            values.mul_(softcap)
        kept = target[rows] != ignore_index
        inside = (target[rows] >= 0) & (target[rows] < num_classes)
        column = target[rows].where(inside, 0)[:, None]

        peak = values.amax(1)
        # A row of -inf alone has no finite peak to subtract.
        shift = peak.where(peak != -torch.inf, 0)
        values.sub_(shift[:, None])
        scale = target_scale[rows]
        loss = -scale * values.gather(1, column)[:, 0]
        if class_weight is not None and class_scale is not None:
            scale = scale + class_scale[rows] * class_weight.sum()
            loss -= class_scale[rows] * (values @ class_weight)
        total = values.exp_().sum(1)
        log_sum = total.log()
        loss += scale * log_sum
        if square_scale is not None:
            log_sum += shift
            scale = scale + 2 * square_scale[rows] * log_sum
            loss += square_scale[rows] * log_sum.square()
        losses[rows] = loss.where(kept, 0)

        values.mul_((scale / total)[:, None])
        values.scatter_add_(1, column, -target_scale[rows][:, None])
        if class_weight is not None and class_scale is not None:
            values.addr_(class_scale[rows], class_weight, alpha=-1)
        if slope is not None:
            values.mul_(slope)
        if values.device.type != "cpu":
            values.masked_fill_(~kept[:, None], 0)
        if grad_bias is not None:
            grad_bias += values.sum(0)
        if stored.dtype != dtype:
            stored.copy_(values)
    return losses
