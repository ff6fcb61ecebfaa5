"""LDLQ: rounding with linear feedback, by a factorization of the Hessian."""

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import implements
from tilework.quant._arguments import (
    check_grid,
    check_grid_options,
    check_hessian,
    check_weight,
)
from tilework.quant.rounding._columns import LENGTH, Problem, blocks, prepare, sweep
from tilework.quant.rounding._grid_rounding import GridRounding
from tilework.quant.storage.quantized_tensor import QuantizedTensor

__all__ = ["ldlq_quantize"]

ROUNDINGS = ("nearest", "stochastic")


@implements(
    "QuIP: 2-Bit Quantization of Large Language Models With Guarantees",
    year=2023,
    arxiv="2307.13304",
)
@torch.no_grad()
@without_autocast
def ldlq_quantize(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int | None = None,
    scheme: str = "asymmetric",
    grid: tuple[Tensor, Tensor] | None = None,
    rounding: str = "nearest",
    greedy_passes: int = 0,
    damp: float = 0.01,
    generator: torch.Generator | None = None,
) -> QuantizedTensor:
    r"""Weights rounded column by column to fixed grids, with feedback of the errors.

    With the damped Hessian :math:`H = (M + 1) D (M + 1)^\top`, where :math:`M` is strictly upper
    triangular, the scale :math:`s`, the zero-point :math:`z` and :math:`b` bits, for
    :math:`k = 0, 1, \dots`:

    .. math::

        v_k = W_k + \sum_{j < k} (W_j - \hat W_j) M_{jk}, \qquad
        q_k = \mathrm{clamp}(\rho(v_k / s + z)), \qquad \hat W_k = s (q_k - z)

    where :math:`\rho` rounds to the nearest, ties to even, or :math:`\rho(u) =
    \lfloor u + \xi \rfloor` with :math:`\xi` uniform in [0, 1), which keeps the mean. Then each of
    the ``greedy_passes`` sets every column in turn to the levels that are best for the others as
    they are, nearest to

    .. math::

        W_k - \frac{1}{H_{kk}} \sum_{j \ne k} (\hat W_j - W_j) H_{jk}

    A column whose input is never on, where the diagonal of the Hessian is 0, becomes 0.

    Args:
        weight: Weights, of shape (out, in).
        hessian: As of :class:`HessianAccumulator`, of shape (in, in), symmetric; only its
            proportions matter.
        bits: Bits of a code, from 1 to 8; at least 2 for ``"symmetric"`` and ``"restricted"``.
        group_size: Weights of a group; None is a whole row.
        scheme: ``"asymmetric"``, ``"symmetric"``, ``"restricted"`` or ``"minmax"``, as of
            :func:`fit_grid`.
        grid: Scale and zero-point in the place of those of :func:`fit_grid`, of their shape or of
            shape (1, 1) for the whole tensor.
        rounding: ``"nearest"`` or ``"stochastic"``.
        greedy_passes: At most so many passes; they end when one changes nothing.
        damp: What is added to the diagonal of the Hessian, in units of its mean, at least 0.
        generator: For stochastic rounding.

    Returns:
        The quantized weights; they dequantize to the dtype of ``weight``.

    Raises:
        ValueError: A tensor is not of the shape above or not finite, the damped Hessian is not
            positive definite, an option is not one of those above, or there are greedy passes
            after stochastic rounding.
        TypeError: A tensor is not of a real floating dtype, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import ldlq_quantize
        >>> weight = torch.tensor([[0.4, 0.4, 3.0]])
        >>> hessian = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> ldlq_quantize(weight, hessian, bits=2).dequantize()
        tensor([[0., 1., 3.]])

    Deviations:
        The released code rounds ties up. Its greedy passes clamp after a whole pass, so that the
        error can rise; here each column is clamped at once.

    Reference:
        Jerry Chee, Yaohui Cai, Volodymyr Kuleshov, Christopher De Sa. QuIP: 2-Bit Quantization of
        Large Language Models With Guarantees. 2023. arXiv:2307.13304.
    """
    name = "ldlq_quantize"
    check_weight(name, weight)
    check_hessian(name, hessian, weight.shape[1])
    check_grid_options(name, bits=bits, group_size=group_size, scheme=scheme)
    _checks.one_of(name, "rounding", rounding, ROUNDINGS)
    _checks.count(name, "greedy_passes", greedy_passes, 0)
    _checks.at_least(name, "damp", damp, 0)
    _checks.same_device(name, weight=weight, hessian=hessian)
    if rounding == "stochastic" and greedy_passes:
        raise _checks.bad_value(name, "greedy_passes", "0 with stochastic rounding", greedy_passes)
    if grid is not None and tuple(grid[0].shape) != (1, 1):
        check_grid(name, *grid, tuple(weight.shape), group_size, "out")
    elif grid is not None:
        check_grid(name, *grid, tuple(weight.shape), None, "tensor")
    return rounded_with_feedback(
        name,
        weight,
        hessian,
        bits=bits,
        group_size=group_size,
        scheme=scheme,
        grid=grid,
        rounding=rounding,
        greedy_passes=greedy_passes,
        damp=damp,
        generator=generator,
    )


def rounded_with_feedback(
    name: str,
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    scheme: str = "asymmetric",
    grid: tuple[Tensor, Tensor] | None = None,
    rounding: str = "nearest",
    greedy_passes: int,
    damp: float,
    generator: torch.Generator | None = None,
) -> QuantizedTensor:
    """The same of arguments that are as they must be, for a function of a name."""

    def drawn(values: Tensor) -> Tensor:
        noise = torch.rand(
            values.shape, generator=generator, dtype=values.dtype, device=values.device
        )
        return values.add_(noise).floor_()

    problem = prepare(name, weight, hessian, damp, grid=grid or ())
    rule = GridRounding(
        problem,
        bits=bits,
        group_size=group_size,
        scheme=scheme,
        grid=grid,
        rounded=torch.round if rounding == "nearest" else drawn,
    )
    sweep(problem, rule, blocks(weight.shape[1], LENGTH))
    for _ in range(greedy_passes):
        if not _improve(problem, rule):
            break
    return rule.result(weight.dtype)


def _improve(problem: Problem, rule: GridRounding) -> bool:
    """A greedy pass: whether it changed a code."""
    columns, hessian = problem.columns, problem.hessian
    before, values = rule.codes.clone(), rule.values()
    errors = values - columns
    for start, stop in blocks(len(columns), LENGTH):
        slopes = hessian[start:stop] @ errors
        for index, position in enumerate(range(start, stop)):
            best = values[position] - slopes[index] / hessian[position, position]
            change = rule.round(position, best) - values[position]
            errors[position] += change
            slopes[index + 1 :].addr_(hessian[position, position + 1 : stop], change)
    return not torch.equal(before, rule.codes)
