"""AdaDim: groups along inputs or along outputs, whichever changes a layer's output less."""

from collections.abc import Callable

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import implements
from tilework.quant._arguments import check_grid_options, check_weight, computed, rows_of
from tilework.quant.grids.rtn_quantize import rtn_quantize
from tilework.quant.smoothing._search import output_error, smallest
from tilework.quant.storage.quantized_tensor import QuantizedTensor

__all__ = ["adadim_quantize"]


@implements(
    "Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large "
    "Language Models",
    year=2023,
    arxiv="2309.15531",
)
@torch.no_grad()
@without_autocast
def adadim_quantize(
    weight: Tensor,
    input: Tensor,
    *,
    bits: int = 4,
    group_size: int | None = 128,
    scheme: str = "asymmetric",
    mse: bool = False,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> QuantizedTensor:
    r"""Weights rounded to nearest in groups of columns or of rows, with the smaller error.

    For both axes, :math:`\hat W` is that of :func:`rtn_quantize`, and the error the mean of
    :math:`(f(\hat W) - f(W))^2`. Groups of rows, ``axis="in"``, keep a column of large weights or
    inputs to itself. On equality it is ``axis="out"``.

    Args:
        weight: Weights of shape (out, in).
        input: Inputs of shape (..., in).
        bits: Bits of a code, from 1 to 8; at least 2 for ``"symmetric"`` and ``"restricted"``.
        group_size: Weights of a group; None is a whole row or column.
        scheme: As of :func:`fit_grid`.
        mse: Whether ranges may be narrowed for a smaller error, as of :func:`fit_grid`.
        forward: The output :math:`f` for weights; None is :math:`X W^\top` for the rows of
            ``input``.

    Returns:
        The quantized weights, whose ``axis`` says which it is; they dequantize to the dtype of
        ``weight``.

    Raises:
        ValueError: A tensor is empty, not finite or of a shape that does not fit, or an option is
            not one of those above.
        TypeError: A tensor is not of a real floating dtype, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import adadim_quantize
        >>> weight = torch.tensor([[0.1, 9.0], [0.2, 9.0], [0.3, 9.0]])
        >>> adadim_quantize(weight, torch.ones(1, 2), bits=2).axis
        'in'

    Deviations:
        Grids contain 0, so that groups of one sign are not clipped.

    Reference:
        Jung Hwan Heo, Jeonghoon Kim, Beomseok Kwon, Byeongwook Kim, Se Jung Kwon, Dongsoo Lee.
        Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large
        Language Models. 2023. arXiv:2309.15531.
    """
    name = "adadim_quantize"
    check_weight(name, weight)
    rows = rows_of(name, input, weight.shape[1])
    check_grid_options(name, bits=bits, group_size=group_size, scheme=scheme)
    _checks.same_device(name, weight=weight, input=input)
    dtype = computed(weight, input)
    both = [
        rtn_quantize(weight, bits=bits, group_size=group_size, axis=axis, scheme=scheme, mse=mse)
        for axis in ("out", "in")
    ]
    of_list = None if forward is None else lambda weights: forward(weights[0])
    error = output_error(name, rows.to(dtype), [weight.to(dtype)], of_list)
    errors = torch.stack([error([one.dequantize(dtype)]) for one in both])
    return both[smallest(name, errors)]
