"""RMS and layer normalization in plain PyTorch, some rows at a time, which stay in the cache."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import HALF, computation_dtype
from tilework.norms._row_norm.common import Backward, Gradients, Normalized, RowNorm

TILE = 2**17  # elements for each thread: 512 KiB in float32
SMALLEST = 2**21  # elements of an input that is worth the overhead
PREFERRED = (
    f"on a CPU, RMS normalization from {SMALLEST} elements; layer normalization from there with a "
    "residual, in half precision or for gradients, and without one for gradients of weight or bias "
    "in half precision"
)


def preferred(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    centered: bool,
) -> bool:
    """Whether this is better than torch's functions on a CPU, by measurement.

    Torch has a fused kernel there for layer normalization without a residual alone. That one adds
    up the gradients of weight and bias in half precision, and loses a tenth over thousands of rows.
    """
    if not _checks.holds_values(input):
        return False
    half, large = input.dtype in HALF, input.numel() >= SMALLEST

    def trained(*tensors: Tensor | None) -> bool:
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    if not centered:
        return large
    if residual is not None:
        return large and (half or trained(input, residual, weight, bias))
    return half and trained(weight, bias)


def forward(given: RowNorm) -> Normalized:
    """See ``RowNorm``."""
    input, residual, dims, eps = given.input, given.residual, given.dims, given.eps
    weight, centered = given.weight, given.centered
    dtype = computation_dtype(input.dtype)
    output = input.new_empty(input.shape)
    total = input.new_empty(0 if residual is None else input.shape, dtype=given.total_dtype)
    mean = input.new_zeros(input.shape[:-dims] if centered else 0, dtype=dtype)
    rstd = input.new_zeros(input.shape[:-dims], dtype=dtype)
    gain, shift = _parameters(weight, given.bias, dims, given.weight_offset, dtype)
    ones = rstd.new_ones(input.shape[-dims:].numel())
    others = (residual, output, None if residual is None else total)
    statistics = (mean if centered else None, rstd)
    for some, branch, result, kept, means, rstds in _tiles(weight, dims, input, others, statistics):
        rows = some if branch is None else torch.add(some.to(dtype), branch)
        rows = rows.to(dtype)
        if kept is not None:
            kept.copy_(rows)
            rows = kept if kept.dtype == dtype else rows
        if centered:
            normal, tile_mean, tile_rstd = torch.native_layer_norm(
                rows, rows.shape[-1:], None if gain is None else gain[0], shift, eps
            )
            if kept is not None and kept.dtype != dtype:
                # The backward starts from the rounded sum, and so do its statistics, which have the
                # dtype of the gain.
                _, tile_mean, tile_rstd = torch.native_layer_norm(
                    kept, kept.shape[-1:], ones, None, eps
                )
            means.copy_(tile_mean[..., 0])
        else:
            tile_rstd = rows.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            normal = torch.mul(rows, tile_rstd, out=result if result.dtype == dtype else None)
            if gain is not None:
                normal.mul_(gain)
        rstds.copy_(tile_rstd[..., 0])
        if normal is not result:
            result.copy_(normal)
    return Normalized(output, total, mean, rstd)


def backward(given: Backward) -> Gradients:
    """See ``Backward``."""
    total, dims, centered = given.total, given.dims, given.centered
    need_total, *need_parameters = given.needed
    parameters = given.weight, given.bias
    compute = computation_dtype(total.dtype)
    grad_rows = total.new_empty(total.shape if need_total else 0, dtype=given.dtype)
    gain, _ = _parameters(*parameters, dims, given.weight_offset, compute)
    weight_sum, bias_sum = (
        torch.zeros_like(_flat(parameter, dims), dtype=compute)
        if need and parameter is not None
        else None
        for parameter, need in zip(parameters, need_parameters, strict=True)
    )
    others = (given.grad_output, given.grad_total, grad_rows if need_total else None)
    statistics = (given.mean if centered else None, given.rstd)
    for some, upper, direct, result, means, rstds in _tiles(
        given.weight, dims, total, others, statistics
    ):
        rows, grad = some.to(compute), upper.to(compute)
        tile_rstd = rstds[..., None]
        normal = torch.sub(rows, means[..., None]).mul_(tile_rstd) if centered else rows * tile_rstd
        if weight_sum is not None:
            weight_sum += (grad * normal).sum(0)
        if bias_sum is not None:
            bias_sum += grad.sum((0, 1))
        if result is None:
            continue
        wdy = grad if gain is None else grad * gain
        c1 = (wdy * normal).mean(-1, keepdim=True)
        if centered:
            wdy = wdy - wdy.mean(-1, keepdim=True)
        tile = normal.mul_(c1).neg_().add_(wdy).mul_(tile_rstd)
        result.copy_(tile if direct is None else tile.add_(direct))
    return Gradients(
        grad_rows,
        *(
            total.new_empty(0)
            if summed is None or parameter is None
            else summed.view(parameter.shape).to(parameter.dtype)
            for summed, parameter in zip((weight_sum, bias_sum), parameters, strict=True)
        ),
    )


def _tiles(
    weight: Tensor | None,
    dims: int,
    first: Tensor,
    others: tuple[Tensor | None, ...],
    statistics: tuple[Tensor | None, ...],
) -> Iterator[tuple[Any, ...]]:
    """Parts of tensors as ``(rows, heads, features)``, and of statistics as ``(rows, heads)``."""
    if first.numel() == 0:
        return
    heads = 1 if weight is None or weight.dim() == dims else weight.shape[0]
    features = first.shape[-dims:].numel()
    parts = [None if t is None else t.reshape(-1, heads, features) for t in (first, *others)]
    parts += [None if t is None else t.view(-1, heads) for t in statistics]
    step = max(1, TILE * torch.get_num_threads() // (heads * features))
    for start in range(0, first.numel() // (heads * features), step):
        yield tuple(None if part is None else part[start : start + step] for part in parts)


def _parameters(
    weight: Tensor | None, bias: Tensor | None, dims: int, offset: float, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Gain of shape ``(heads, features)`` and shift of shape ``(features,)``."""
    gain = None if weight is None else _flat(weight, dims).to(dtype) + offset
    return gain, None if bias is None else bias.flatten().to(dtype)


def _flat(parameter: Tensor, dims: int) -> Tensor:
    return parameter.reshape(parameter.shape[:-dims].numel(), parameter.shape[-dims:].numel())
