"""The statistics of a linear head's logits in plain PyTorch, tile by tile of tokens and classes.

No more than three tiles of logits exist at any time. The backward computes them again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tilework._operators import HALF, computation_dtype

TOKENS = 2048
TILE = 2048 * 1024  # logits of a tile: 8 MiB in float32, which stays in a CPU's last cache


def forward(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.linear_logit_stats``."""
    rows, hidden, kept_target = _kept(input, target, ignore_index)
    head = _Head(hidden, linear_weight, linear_bias, softcap)
    statistics = hidden.new_zeros(4, len(hidden), dtype=head.dtype)
    for tokens in _slices(len(hidden), TOKENS):
        shift, total, target_gap, class_gap = statistics[:, tokens]
        peak = torch.full_like(shift, -torch.inf)
        target_logit = torch.full_like(shift, torch.nan)
        weight_seen = shift.new_zeros(())
        for classes in head.classes():
            logits = head.logits(tokens, classes)
            column = kept_target[tokens] - classes.start
            inside = (column >= 0) & (column < logits.shape[1])
            here = logits.gather(1, column.where(inside, 0)[:, None])[:, 0]
            target_logit = here.where(inside, target_logit)

            old_peak, peak = peak, torch.maximum(peak, logits.amax(1))
            # A row of -inf alone has no finite peak to subtract.
            new_shift = peak.where(peak != -torch.inf, 0)
            logits.sub_(new_shift[:, None])
            if class_weight is not None:
                class_gap += (new_shift - shift) * weight_seen - logits @ class_weight[classes]
                weight_seen = weight_seen + class_weight[classes].sum()
            total.mul_((old_peak - new_shift).exp_()).add_(logits.exp_().sum(1))
            shift.copy_(new_shift)
        torch.sub(shift, target_logit, out=target_gap)
    ignored = target == ignore_index
    statistics = _spread(statistics, rows, len(input), dim=1).masked_fill_(ignored, 0)
    shift, total, target_gap, class_gap = statistics.unbind()
    return shift.clone(), total.masked_fill(ignored, 1), target_gap.clone(), class_gap.clone()


def backward(
    grad_total: Tensor,
    grad_target_gap: Tensor,
    grad_class_gap: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    shift: Tensor,
    softcap: float | None,
    ignore_index: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; an empty tensor for each that is not needed."""
    rows, hidden, kept_target = _kept(input, target, ignore_index)
    vectors = torch.stack((shift, grad_total, grad_target_gap, grad_class_gap))
    vectors.masked_fill_(target == ignore_index, 0)
    if rows is not None:
        vectors = vectors.index_select(1, rows)
    head = _Head(hidden, linear_weight, linear_bias, softcap)
    half = head.product_dtype in HALF

    grad_hidden = hidden.new_zeros(hidden.shape if needed[0] else 0, dtype=head.dtype)
    grad_weight = torch.empty_like(
        linear_weight if needed[1] else linear_weight[:0], memory_format=torch.contiguous_format
    )
    grad_bias = linear_weight.new_zeros(len(linear_weight) if needed[2] else 0, dtype=head.dtype)
    for classes in head.classes():
        weight_tile = hidden.new_zeros(
            (classes.stop - classes.start, hidden.shape[1]) if needed[1] else 0, dtype=head.dtype
        )
        for tokens in _slices(len(hidden), TOKENS):
            row_shift, grad_sum, grad_target, grad_class = vectors[:, tokens]
            logits = head.logits(tokens, classes)
            slope = None if softcap is None else 1 - (logits / softcap).square_()
            grad = logits.sub_(row_shift[:, None]).exp_().mul_(grad_sum[:, None])
            column = kept_target[tokens] - classes.start
            inside = (column >= 0) & (column < grad.shape[1])
            grad.scatter_add_(
                1, column.where(inside, 0)[:, None], -grad_target.where(inside, 0)[:, None]
            )
            if class_weight is not None:
                grad.addr_(grad_class, class_weight[classes], alpha=-1)
            if slope is not None:
                grad.mul_(slope)
            if needed[2]:
                grad_bias[classes] += grad.sum(0)
            if not (needed[0] or needed[1]):
                continue
            factor = head.factor(grad)
            if needed[0]:
                _accumulate(grad_hidden[tokens], factor, head.weight(classes), half)
            if needed[1]:
                _accumulate(weight_tile, factor.T, head.hidden(tokens), half)
        if needed[1]:
            grad_weight[classes] = weight_tile
    return (
        _spread(grad_hidden, rows, len(input), dim=0).to(input.dtype) if needed[0] else grad_hidden,
        grad_weight,
        grad_bias.to(linear_weight.dtype),
    )


class _Head:
    """The head's tiles of logits, in the computation dtype, in one reused buffer."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
    ) -> None:
        self._hidden, self._weight, self._bias, self._softcap = hidden, weight, bias, softcap
        self.dtype = computation_dtype(hidden.dtype)
        self.product_dtype = _product_dtype(hidden)
        tokens = min(len(hidden), TOKENS)
        # Few tokens or many features must not make the tiles of the weight large.
        self._width = max(1, min(TILE // max(1, tokens), 4 * TILE // hidden.shape[1], len(weight)))
        size = tokens * self._width
        self._logits = hidden.new_empty(size, dtype=self.dtype)
        self._product = (
            self._logits
            if self.product_dtype == self.dtype
            else hidden.new_empty(size, dtype=self.product_dtype)
        )

    def classes(self) -> Iterator[slice]:
        return _slices(len(self._weight), self._width)

    def hidden(self, tokens: slice) -> Tensor:
        return self._hidden[tokens].to(self.product_dtype)

    def weight(self, classes: slice) -> Tensor:
        return self._weight[classes].to(self.product_dtype)

    def logits(self, tokens: slice, classes: slice) -> Tensor:
        hidden, weight = self.hidden(tokens), self.weight(classes)
        shape = len(hidden), len(weight)
        logits = self._logits[: len(hidden) * len(weight)].view(shape)
        product = self._product[: len(hidden) * len(weight)].view(shape)
        torch.mm(hidden, weight.T, out=product)
        if self._product is not self._logits:
            logits.copy_(product)
        if self._bias is not None:
            logits.add_(self._bias[classes])
        if self._softcap is not None:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
        return logits

    def factor(self, grad: Tensor) -> Tensor:
        if self._product is self._logits:
            return grad
        return self._product[: grad.numel()].view(grad.shape).copy_(grad)


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the matrix products: half precision only where the processor multiplies it."""
    if tensor.device.type != "cpu":
        return tensor.dtype
    if tensor.dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return computation_dtype(tensor.dtype)


def _accumulate(total: Tensor, left: Tensor, right: Tensor, half: bool) -> None:
    if half:
        total.add_(left @ right)
    else:
        total.addmm_(left, right)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _kept(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """The rows that count, with their indices (None for all of them)."""
    ignored = target == ignore_index
    if input.device.type != "cpu":
        # Counting would synchronize, so ignored rows are computed on zeros.
        rows = torch.arange(len(input), device=input.device)
        return rows, input.masked_fill(ignored[:, None], 0), target
    if not ignored.any():
        return None, input, target
    rows = ignored.logical_not().nonzero()[:, 0]
    return rows, input.index_select(0, rows), target.index_select(0, rows)


def _spread(values: Tensor, rows: Tensor | None, length: int, dim: int) -> Tensor:
    """Put values back to their rows along a dimension, zeros elsewhere."""
    if rows is None:
        return values
    shape = list(values.shape)
    shape[dim] = length
    return values.new_zeros(shape).index_copy_(dim, rows, values)
