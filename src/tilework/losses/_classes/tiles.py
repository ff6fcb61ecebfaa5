"""What the implementations in plain PyTorch, and the launchers of kernels, have in common."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tilework import _torch
from tilework._operators import HALF, computation_dtype

TOKENS = 2048
TILE = 2048 * 1024  # logits of a tile: 8 MiB in float32, which stays in a CPU's last cache
NEGLIGIBLE = -1000.0  # the exponential is 0 in every dtype, and so is its product with the gap
_BFLOAT16_PRODUCTS = _torch.multiplies_bfloat16()


def slices(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that cover ``length``."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the matrix products: half precision only where the processor multiplies it."""
    if tensor.device.type != "cpu":
        return tensor.dtype
    if tensor.dtype == torch.bfloat16 and _BFLOAT16_PRODUCTS:
        return torch.bfloat16
    return computation_dtype(tensor.dtype)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to a total in the computation dtype."""
    if left.dtype not in HALF:
        total.addmm_(left, right)
    elif left.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        # The CPU rounds each product to half precision.
        total.add_(left @ right)


def filter_scale(grad_total: Tensor, grad_moment: Tensor | None, total: Tensor) -> Tensor:
    """What ``gradient_filter`` is a fraction of, for each row.

    It is the coefficient of the probabilities, or that of the entropy alone where it has one, as
    the gradient of the total then says nothing about the others: it holds the entropy itself.
    """
    coefficient = grad_total
    if grad_moment is not None:
        coefficient = grad_moment.where(grad_moment != 0, grad_total)
    return coefficient.abs() * total


def kept_rows(ignored: Tensor, *tensors: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """The rows that count: their indices (None for all of them), and the tensors' rows there."""
    if ignored.device.type != "cpu":
        # Counting would synchronize, so ignored rows of hidden states are computed on zeros.
        rows = torch.arange(len(ignored), device=ignored.device)
        return rows, [
            tensor.masked_fill(ignored[:, None], 0) if tensor.is_floating_point() else tensor
            for tensor in tensors
        ]
    if not ignored.any():
        return None, list(tensors)
    rows = ignored.logical_not().nonzero()[:, 0]
    return rows, [tensor.index_select(0, rows) for tensor in tensors]


def spread(values: Tensor, rows: Tensor | None, length: int, dim: int) -> Tensor:
    """Put values back to their rows along a dimension, zeros elsewhere."""
    if rows is None:
        return values
    shape = list(values.shape)
    shape[dim] = length
    return values.new_zeros(shape).index_copy_(dim, rows, values)


def tile_width(tokens: int, linear_weight: Tensor) -> int:
    """Few tokens or many features must not make the tiles of the weight large."""
    classes, features = linear_weight.shape
    return max(1, min(TILE // max(1, min(tokens, TOKENS)), 4 * TILE // features, classes))


def merge_exponentials(shifts: Tensor, totals: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shift and total of all classes from those of parts, shape (parts, N), in their order.

    With them come what the shift exceeds that of each part by, and its exponential's inverse.
    """
    shifts = shifts.detach()
    # A part of logits of -inf has no shift to speak of.
    shift = shifts.where(totals != 0, -torch.inf).amax(0)
    shift = shift.where(shift != -torch.inf, 0)
    gaps = shift - shifts
    decays = gaps.neg().exp().where(totals != 0, 0)
    return shift, (totals * decays).sum(0), gaps, decays


class Head:
    """The head's tiles of logits, in the computation dtype, in one reused buffer."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        temperature: float,
        width: int | None = None,
    ) -> None:
        self._hidden, self._weight, self._bias = hidden, weight, bias
        self._softcap, self._temperature = softcap, temperature
        self.dtype = computation_dtype(hidden.dtype)
        self.product_dtype = product_dtype(hidden)
        self._width = tile_width(len(hidden), weight) if width is None else width
        size = min(len(hidden), TOKENS) * self._width
        self._logits = hidden.new_empty(size, dtype=self.dtype)
        self._product = (
            self._logits
            if self.product_dtype == self.dtype
            else hidden.new_empty(size, dtype=self.product_dtype)
        )

    def tokens(self) -> Iterator[slice]:
        """The tiles of tokens."""
        return slices(len(self._hidden), TOKENS)

    def classes(self) -> Iterator[slice]:
        """The tiles of classes."""
        return slices(len(self._weight), self._width)

    def hidden(self, tokens: slice) -> Tensor:
        """Hidden states as the products take them."""
        return self._hidden[tokens].to(self.product_dtype)

    def weight(self, classes: slice) -> Tensor:
        """Rows of the weight as the products take them."""
        return self._weight[classes].to(self.product_dtype)

    def outputs(self, tokens: slice, classes: slice) -> Tensor:
        """The output in a tile, before softcap and temperature; replaces the last one."""
        hidden, weight = self.hidden(tokens), self.weight(classes)
        shape = len(hidden), len(weight)
        logits = self._logits[: len(hidden) * len(weight)].view(shape)
        product = self._product[: len(hidden) * len(weight)].view(shape)
        torch.mm(hidden, weight.T, out=product)
        if self._product is not self._logits:
            logits.copy_(product)
        if self._bias is not None:
            logits.add_(self._bias[classes])
        return logits

    def cap(self, outputs: Tensor, need_slope: bool = False) -> Tensor | None:
        """Make logits of outputs, in place; return the derivative of the softcap."""
        slope = None
        if self._softcap is not None:
            outputs.div_(self._softcap).tanh_()
            slope = 1 - outputs.square() if need_slope else None
            outputs.mul_(self._softcap)
        if self._temperature != 1:
            outputs.div_(self._temperature)
        return slope

    def factor(self, grad: Tensor) -> Tensor:
        """The gradient of a tile as the products take it."""
        if self._product is self._logits:
            return grad
        return self._product[: grad.numel()].view(grad.shape).copy_(grad)

    def gradients(
        self,
        needed: Sequence[bool],
        of_outputs: Callable[[slice, slice], tuple[Tensor, Tensor | None]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of hidden states, weight and bias; an empty tensor where not needed.

        ``of_outputs`` gives those of a tile of outputs, and which classes of the tile count in the
        products, None for all.
        """
        hidden, weight = self._hidden, self._weight
        grad_hidden = hidden.new_zeros(hidden.shape if needed[0] else 0, dtype=self.dtype)
        grad_weight = torch.empty_like(
            weight if needed[1] else weight[:0], memory_format=torch.contiguous_format
        )
        grad_bias = weight.new_zeros(len(weight) if needed[2] else 0, dtype=self.dtype)
        for classes in self.classes():
            weight_tile = hidden.new_zeros(
                (classes.stop - classes.start, hidden.shape[1]) if needed[1] else 0,
                dtype=self.dtype,
            )
            for tokens in self.tokens():
                grad, counted = of_outputs(tokens, classes)
                if needed[2]:
                    grad_bias[classes] += grad.sum(0)
                if not (needed[0] or needed[1]):
                    continue
                rows, tile = self.weight(classes), weight_tile
                if counted is None:
                    factor = self.factor(grad)
                else:
                    factor = grad.index_select(1, counted).to(self.product_dtype)
                    rows = rows.index_select(0, counted)
                    tile = tile.index_select(0, counted) if needed[1] else tile
                if needed[0]:
                    accumulate(grad_hidden[tokens], factor, rows)
                if needed[1]:
                    accumulate(tile, factor.T, self.hidden(tokens))
                    if counted is not None:
                        weight_tile.index_copy_(0, counted, tile)
            if needed[1]:
                grad_weight[classes] = weight_tile
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias.to(weight.dtype)
