"""Rounding column by column, where each column makes up for the errors of those before it.

All of GPTQ's kind are this sweep with rounding rules of their own. With the Hessian
:math:`H = R R^T`, where :math:`R` is upper triangular, the Cholesky factor of its inverse is
:math:`U = R^{-1}`: one factorization, and the inverse of a triangle. When column :math:`j` has been
rounded to :math:`\\hat w_j`, each later one becomes

.. math::

    w_k + (\\hat w_j - w_j) \\frac{U_{jk}}{U_{jj}}

which is the best that it can be if no later one is rounded. Weights are kept transposed, so that a
column is one after another in memory.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from tilework.quant._arguments import computed

LENGTH = 128
"""Of a block of columns, whose weights stay in the cache."""


class Problem(NamedTuple):
    """Weights and their Hessian, in the order in which columns are rounded."""

    columns: Tensor
    """The transposed weights, zero for inputs that are never on."""
    hessian: Tensor
    """The damped Hessian."""
    factors: Tensor
    """Upper triangular: :math:`U_{jk} / U_{jj}`."""
    costs: Tensor
    """What the square of an error of each column costs: :math:`U_{jj}^{-2}`."""
    order: Tensor | None
    """The original place of each column; None where it is the same."""

    def restored(self, columns: Tensor) -> Tensor:
        """A matrix of the same kind as the weights are, in the original order of columns."""
        if self.order is None:
            return columns.mT.contiguous()
        result = torch.empty_like(columns)
        result[self.order] = columns
        return result.mT.contiguous()


Current = Callable[[int, int], Tensor]
"""Columns from one to another, with the errors of all earlier blocks made up for."""


@runtime_checkable
class Rounding(Protocol):
    """How the columns of a sweep are rounded; it keeps the results."""

    def begin(self, start: int, stop: int, current: Current) -> None:
        """Before the columns of a block."""

    def column(self, position: int, following: Tensor) -> Tensor:
        """The values that stand for a column, the first of these; the block's others follow it."""


def sorted_by_importance(hessian: Tensor) -> Tensor:
    """The columns in falling order of the diagonal."""
    return hessian.diagonal().argsort(descending=True, stable=True)


def prepare(
    name: str,
    weight: Tensor,
    hessian: Tensor,
    damp: float,
    *,
    act_order: bool = False,
    grid: tuple[Tensor, ...] = (),
) -> Problem:
    """Damp and factorize; columns whose input is never on are zero and stand for themselves."""
    dtype = computed(weight, hessian, *grid)
    columns = weight.to(dtype).mT.contiguous()
    hessian = hessian.to(dtype).clone()
    order = sorted_by_importance(hessian) if act_order else None
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal.add_(damp * diagonal.mean())
    diagonal.masked_fill_(dead, 1.0)
    if columns.data_ptr() == weight.data_ptr():
        columns = columns.clone()
    columns.masked_fill_(dead.unsqueeze(1), 0.0)
    if order is not None:
        columns, hessian = columns[order], hessian[order][:, order]
    factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed:
        raise ValueError(
            f"{name}: hessian must be positive definite with damp={damp} of its mean diagonal "
            "added; a larger damp makes it so"
        )
    upper = factor.flip(0, 1)
    roots = upper.diagonal()
    identity = torch.eye(len(upper), dtype=dtype, device=upper.device)
    factors = torch.linalg.solve_triangular(upper / roots, identity, upper=True, unitriangular=True)
    return Problem(columns, hessian, factors, roots.square(), order)


def blocks(columns: int, length: int, group_size: int | None = None) -> Iterator[tuple[int, int]]:
    """Blocks of at most a length; short groups lie within a block, long ones have their own."""
    if group_size is None:
        group_size = length
    outer = max(length // group_size, 1) * group_size
    for first in range(0, columns, outer):
        end = min(first + outer, columns)
        for start in range(first, end, length):
            yield start, min(start + length, end)


def sweep(problem: Problem, rounding: Rounding, blocks: Iterable[tuple[int, int]]) -> None:
    """Round the columns one after another."""
    columns, factors = problem.columns, problem.factors
    errors = torch.empty_like(columns)
    for start, stop in blocks:

        def current(first: int, end: int, start: int = start) -> Tensor:
            return torch.addmm(columns[first:end], factors[:start, first:end].mT, errors[:start])

        rounding.begin(start, stop, current)
        block = current(start, stop)
        for index, position in enumerate(range(start, stop)):
            values = rounding.column(position, block[index:])
            error = torch.sub(values, block[index], out=errors[position])
            block[index + 1 :].addr_(factors[position, position + 1 : stop], error)
