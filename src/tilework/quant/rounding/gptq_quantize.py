"""GPTQ: each column makes up for the rounding errors of the columns before it."""

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import implements
from tilework.quant._arguments import check_grid_options, check_hessian, check_weight
from tilework.quant.rounding._columns import blocks, prepare, sweep
from tilework.quant.rounding._grid_rounding import SCALES, GridRounding
from tilework.quant.storage.quantized_tensor import QuantizedTensor

__all__ = ["gptq_quantize"]


@implements(
    "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    year=2022,
    arxiv="2210.17323",
)
@torch.no_grad()
@without_autocast
def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int | None = None,
    scheme: str = "asymmetric",
    act_order: bool = False,
    scales: str = "fresh",
    block_size: int = 128,
    damp: float = 0.01,
    mse: bool = False,
) -> QuantizedTensor:
    r"""Weights rounded column by column, where later columns make up for earlier errors.

    With the weights :math:`W`, the damped Hessian :math:`H` of the inputs, and the upper Cholesky
    factor :math:`U` of its inverse, :math:`H^{-1} = U^\top U`, for :math:`j = 0, 1, \dots`:

    .. math::

        \hat w_j = \text{nearest level to } w_j, \qquad
        w_k \leftarrow w_k - \frac{w_j - \hat w_j}{U_{jj}} U_{jk} \quad \text{for } k > j

    Levels are of the grids that :func:`fit_grid` gives. Without ``group_size`` there is one for
    each row, fitted before the first column. For groups, ``scales`` says to what they are fitted:

    - ``"fresh"``: to the weights as they are when the first column of the group is reached;
    - ``"stale"``: as they were when the block of ``block_size`` columns began in which the group
      begins;
    - ``"static"``: as they came.

    ``act_order`` takes the columns in falling order of the diagonal of the Hessian; groups are then
    of columns in that order, but for ``"static"``. A column whose input is never on, where that
    diagonal is 0, becomes 0.

    Args:
        weight: Weights, of shape (out, in).
        hessian: As of :class:`HessianAccumulator`, of shape (in, in), symmetric; only its
            proportions matter.
        bits: Bits of a code, from 1 to 8; at least 2 for ``"symmetric"`` and ``"restricted"``.
        group_size: Weights of a group; None is a whole row.
        scheme: ``"asymmetric"``, ``"symmetric"``, ``"restricted"`` or ``"minmax"``, as of
            :func:`fit_grid`.
        act_order: Whether important columns come first.
        scales: ``"fresh"``, ``"stale"`` or ``"static"``.
        block_size: Columns of a block, which is computed together; but for ``"stale"`` it changes
            nothing but speed.
        damp: What is added to the diagonal of the Hessian, in units of its mean, at least 0.
        mse: Whether ranges may be narrowed for a smaller error, as of :func:`fit_grid`.

    Returns:
        The quantized weights; they dequantize to the dtype of ``weight``. They have a
        ``group_index`` where groups are of columns in another order.

    Raises:
        ValueError: A tensor is not of the shape above or not finite, the damped Hessian is not
            positive definite, or an option is not one of those above.
        TypeError: A tensor is not of a real floating dtype, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import gptq_quantize, hessian_loss, rtn_quantize
        >>> weight = torch.tensor([[0.4, 0.4, 3.0]])
        >>> hessian = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> gptq_quantize(weight, hessian, bits=2).dequantize()
        tensor([[0., 1., 3.]])
        >>> rtn_quantize(weight, bits=2).dequantize()
        tensor([[0., 0., 3.]])

    Deviations:
        The released code and GPTQModel are ``"stale"``; SpQR and torchao ``"fresh"``;
        llm-compressor and the released ``static_groups`` are ``"static"``. ``"fresh"`` is the
        default here because it is adaptive and yet does not depend on ``block_size``. Columns
        whose input is never on come last with ``act_order``, and count in the mean of the diagonal,
        so that the result does not depend on the units of the inputs. A Hessian that is not
        positive definite is refused, neither damped further nor replaced by rounding to nearest.

    Reference:
        Elias Frantar, Saleh Ashkboos, Torsten Hoefler, Dan Alistarh. GPTQ: Accurate Post-Training
        Quantization for Generative Pre-trained Transformers. 2022. arXiv:2210.17323.
    """
    return rounded_with_compensation(
        "gptq_quantize",
        weight,
        hessian,
        bits=bits,
        group_size=group_size,
        scheme=scheme,
        act_order=act_order,
        scales=scales,
        block_size=block_size,
        damp=damp,
        mse=mse,
    )


def rounded_with_compensation(
    name: str,
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int | None,
    scheme: str,
    scales: str,
    block_size: int,
    damp: float,
    act_order: bool = False,
    mse: bool = False,
) -> QuantizedTensor:
    """The same for a function of a name."""
    check_weight(name, weight)
    check_hessian(name, hessian, weight.shape[1])
    check_grid_options(name, bits=bits, group_size=group_size, scheme=scheme)
    _checks.one_of(name, "scales", scales, SCALES)
    _checks.count(name, "block_size", block_size)
    _checks.at_least(name, "damp", damp, 0)
    _checks.same_device(name, weight=weight, hessian=hessian)
    problem = prepare(name, weight, hessian, damp, act_order=act_order)
    rounding = GridRounding(
        problem, bits=bits, group_size=group_size, scheme=scheme, scales=scales, mse=mse
    )
    columns = weight.shape[1]
    whole = group_size if scales == "fresh" else None
    sweep(problem, rounding, blocks(columns, block_size, whole))
    return rounding.result(weight.dtype)
