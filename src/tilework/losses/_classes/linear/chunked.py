"""The loss together with its gradients, chunk by chunk of tokens, in plain PyTorch.

A chunk's logits become their own gradients in place, and two more matrix products turn these into
the gradients of input and weight: six operations for each token, feature and class, where computing
the logits again takes eight. The loss must be a sum whose coefficients are known beforehand.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tilework._operators import HALF, computation_dtype
from tilework.losses._classes import blocks
from tilework.losses._classes.linear.common import LinearSum, Sum
from tilework.losses._classes.statistics import FORMULAS, Formula, Rows
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


def chunk_tokens(input: Tensor, linear_weight: Tensor) -> int:
    """The tokens of a chunk: all where that takes less than adding up the weight's gradient."""
    tokens, (classes, features) = math.prod(input.shape[:-1]), linear_weight.shape
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
    if tokens < math.prod(input.shape[:-1]) and input.dtype in HALF:
        size += 4 * linear_weight.numel()
    if dtype != input.dtype:
        size += dtype.itemsize * linear_weight.numel()
    return size


def loss_and_gradients(logit_gradient_: Callable[..., Tensor], given: LinearSum) -> Sum:
    """The summed losses of the kept rows, with their gradients."""
    input, class_weight = given.input, given.class_weight
    of_input, of_weight, of_bias = given.needed
    ignored = given.target == given.ignore_index
    places, (hidden, target) = kept_rows(ignored, input, given.target)
    rows = Rows.of(given.weight, given.target_weight, len(given.linear_weight), class_weight)
    rows = rows if places is None else rows.at(places)
    step = max(1, chunk_tokens(hidden, given.linear_weight))
    product, dtype = product_dtype(hidden), computation_dtype(hidden.dtype)
    weight = given.linear_weight.to(product)
    one_product = len(hidden) <= step and product == input.dtype

    buffer = hidden.new_empty(min(step, len(hidden)) * len(weight), dtype=product)
    grad_hidden = hidden.new_empty(hidden.shape if of_input else 0)
    grad_weight = weight.new_empty(
        weight.shape if of_weight else 0, dtype=input.dtype if one_product else dtype
    )
    if len(hidden) == 0 or product != grad_weight.dtype:
        grad_weight.zero_()
    grad_bias = weight.new_zeros(len(weight) if of_bias else 0, dtype=dtype)
    losses = hidden.new_empty(len(hidden), dtype=dtype)
    for tokens in slices(len(hidden), step):
        chunk = hidden[tokens].to(product)
        logits = buffer[: len(chunk) * len(weight)].view(len(chunk), len(weight))
        torch.mm(chunk, weight.T, out=logits)
        losses[tokens] = logit_gradient_(
            logits,
            target[tokens],
            given.ignore_index,
            given.linear_bias,
            given.softcap,
            class_weight,
            FORMULAS[given.formula],
            rows.at(tokens),
            given.numbers,
            grad_bias if of_bias else None,
        )
        if of_input:
            grad_hidden[tokens] = logits @ weight
        if of_weight and tokens.start == 0 and product == grad_weight.dtype:
            torch.mm(logits.T, chunk, out=grad_weight)
        elif of_weight:
            accumulate(grad_weight, logits.T, chunk)
    return Sum(
        losses.sum(),
        spread(grad_hidden, places, len(input), dim=0) if of_input else grad_hidden,
        grad_weight.to(input.dtype),
        grad_bias.to(input.dtype),
    )


def logit_gradient_(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    linear_bias: Tensor | None,
    softcap: float | None,
    class_weight: Tensor | None,
    formula: Formula,
    rows: Rows,
    numbers: Sequence[float],
    grad_bias: Tensor | None,
) -> Tensor:
    """Turn products into gradients of their losses, in place; add up the bias's; return losses."""
    losses = torch.empty_like(rows.weight)
    dtype = computation_dtype(logits.dtype)
    memory = None if logits.dtype == dtype else blocks.scratch(logits)
    for (some,), _ in blocks.places(logits):
        stored = logits[some]
        values = stored if memory is None else blocks.block_of(memory, stored).copy_(stored)
        if linear_bias is not None:
            values.add_(linear_bias)
        slope = None
        if softcap is not None:
            values.div_(softcap).tanh_()
            slope = 1 - values.square()
            values.mul_(softcap)
        losses[some] = blocks.losses_and_gradient_(
            values,
            values,
            target[some],
            ignore_index,
            class_weight,
            formula,
            rows.at(some),
            numbers,
        )
        if slope is not None:
            values.mul_(slope)
        if grad_bias is not None:
            grad_bias += values.sum(0)
        if memory is not None:
            stored.copy_(values)
    return losses
