"""Columns of a sweep rounded to the levels of grids."""

from collections.abc import Callable

import torch
from torch import Tensor

from tilework.quant.grids.fit_grid import fit_grid, lowest_code
from tilework.quant.rounding._columns import Current, Problem
from tilework.quant.storage.quantized_tensor import QuantizedTensor

SCALES = ("fresh", "stale", "static")


class GridRounding:
    """Rounds to grids that are fitted before the sweep, in its course, or given."""

    def __init__(
        self,
        problem: Problem,
        *,
        bits: int,
        group_size: int | None,
        scheme: str,
        scales: str = "static",
        mse: bool = False,
        grid: tuple[Tensor, Tensor] | None = None,
        rounded: Callable[[Tensor], Tensor] = torch.round,
    ) -> None:
        columns = problem.columns
        count, rows = columns.shape
        self._is_of_all = grid is not None and grid[0].numel() == 1
        self.problem = problem
        self._bits = bits
        self._group_size = group_size
        self._codes = torch.empty_like(columns, dtype=torch.uint8)
        self.range = lowest_code(scheme), 2**bits - 1
        self._rounded = rounded
        self._fitting = scales if group_size is not None and grid is None else "static"
        self.options = {"bits": bits, "scheme": scheme, "mse": mse}
        self._size = min(group_size or count, count)
        if self._fitting != "static":
            shape = -(-count // self._size), rows
            self._scale, self._zero_point = columns.new_empty(shape), columns.new_empty(shape)
        else:
            if grid is None:
                weight = problem.restored(columns)
                grid = fit_grid(weight, group_size=group_size, **self.options)  # type: ignore[arg-type]
            self._scale, self._zero_point = (one.to(columns).mT.contiguous() for one in grid)
        places = list(range(count))
        if problem.order is not None and self._fitting == "static":
            places = problem.order.tolist()
        self._groups = [0 if self._is_of_all else place // self._size for place in places]

    def begin(self, start: int, stop: int, current: Current) -> None:
        """Fit the grids of groups that begin in the block, where they are of its beginning."""
        self._current = current
        if self._fitting == "stale":
            first = -(-start // self._size) * self._size
            for position in range(first, stop, self._size):
                self._fit(position, current(position, self._end(position)))

    def _end(self, position: int) -> int:
        """Where the group that begins at a position ends."""
        return min(position + self._size, len(self._codes))

    def _fit(self, position: int, columns: Tensor) -> None:
        group = position // self._size
        self._scale[group], self._zero_point[group] = self.fitted(position, columns.mT)

    def fitted(self, position: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The grids of the rows of a group that begins at a position."""
        scale, zero_point = fit_grid(weight, **self.options)  # type: ignore[arg-type]
        return scale.squeeze(1), zero_point.squeeze(1)

    def column(self, position: int, following: Tensor) -> Tensor:
        """Round a column, and keep its codes."""
        if self._fitting == "fresh" and position % self._size == 0:
            end = self._end(position)
            is_here = end - position <= len(following)
            columns = following[: end - position] if is_here else self._current(position, end)
            self._fit(position, columns)
        return self.round(position, following[0])

    def round(self, position: int, column: Tensor) -> Tensor:
        """The same, with the grid that the column has."""
        scale, zero_point = self.grid(position)
        codes = self._rounded((column / scale).add_(zero_point)).clamp_(*self.range)
        self._codes[position] = codes
        return codes.sub_(zero_point).mul_(scale)

    def grid(self, position: int) -> tuple[Tensor, Tensor]:
        """The scales and zero-points of a column."""
        group = self._groups[position]
        return self._scale[group], self._zero_point[group]

    def values(self) -> Tensor:
        """What the codes of all columns stand for, in the order of the sweep."""
        groups = torch.tensor(self._groups, device=self._codes.device)
        scale, zero_point = self._scale[groups], self._zero_point[groups]
        return scale * (self._codes.to(scale.dtype) - zero_point)

    @property
    def codes(self) -> Tensor:
        """Of all columns, in the order of the sweep."""
        return self._codes

    def result(self, dtype: torch.dtype) -> QuantizedTensor:
        """The quantized weights."""
        order, group_index = self.problem.order, None
        if order is not None and self._fitting != "static":
            group_index = torch.empty_like(order)
            group_index[order] = torch.tensor(self._groups, device=order.device)
        scale, zero_point = self._scale.mT.contiguous(), self._zero_point.mT.contiguous()
        codes = self.problem.restored(self._codes)
        return QuantizedTensor(
            codes,
            scale,
            zero_point,
            bits=self._bits,
            group_size=None if self._is_of_all else self._group_size,
            axis="tensor" if self._is_of_all else "out",
            group_index=group_index,
            dtype=dtype,
        )
