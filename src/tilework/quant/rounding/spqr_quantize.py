"""SpQR: small groups with quantized statistics, and weights that stand out kept as they are."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import implements
from tilework.quant._arguments import (
    check_bits,
    check_grid_options,
    check_hessian,
    check_weight,
)
from tilework.quant.grids.fit_grid import dequantize_affine, fit_grid, quantize_affine
from tilework.quant.grids.rtn_quantize import rtn_quantize
from tilework.quant.rounding._columns import Problem, blocks, prepare, sweep
from tilework.quant.rounding._grid_rounding import GridRounding
from tilework.quant.storage.quantized_tensor import QuantizedTensor

__all__ = ["SpQRTensor", "spqr_quantize"]

_PAPER = implements(
    "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression",
    year=2023,
    arxiv="2306.03078",
)
_ELEMENTS = 2**21
"""Of working memory, when entries are left out one by one."""

Triple = tuple[Tensor, Tensor, Tensor]


@_PAPER
@dataclass(frozen=True, eq=False, repr=False)
class SpQRTensor(QuantizedTensor):
    """A :class:`QuantizedTensor` some of whose weights, the outliers, are kept as they are.

    The outliers of row ``o`` are the entries from ``outlier_offsets[o]`` to
    ``outlier_offsets[o + 1]`` of the other two tensors, in rising order of columns.

    Args:
        codes: As of :class:`QuantizedTensor`, and so are all that are not named here.
        scale: Scales, as they are after they were quantized.
        zero_point: Zero-points, as they are after they were quantized.
        bits: Bits of a code.
        group_size: Weights of a group.
        axis: ``"out"``.
        group_index: The group of each column.
        input_scale: Factors of columns.
        transform: What was done to the weights before.
        dtype: What :meth:`dequantize` returns.
        outlier_offsets: Where the outliers of each row begin, int64 of shape (out + 1,).
        outlier_columns: Their columns, int64.
        outlier_values: Their values.
        scale_quantized: For each group the codes, of shape (out,), and the grid of the scales of
            its rows, of shape (runs,); None if they are not quantized.
        zero_quantized: The same of the zero-points.

    Raises:
        ValueError: A tensor does not fit the others, or an option is not one of those above.
        TypeError: A tensor is not of the dtype that it must have, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import spqr_quantize
        >>> weight = torch.tensor([[0.0, 1.0, 2.0, 50.0]])
        >>> quantized = spqr_quantize(weight, torch.eye(4), bits=2, outlier_threshold=0.0)
        >>> quantized.dequantize()
        tensor([[ 0.,  1.,  2., 50.]])

    Reference:
        Tim Dettmers, Ruslan Svirschevski, Vage Egiazarian, and others. SpQR: A Sparse-Quantized
        Representation for Near-Lossless LLM Weight Compression. 2023. arXiv:2306.03078.
    """

    outlier_offsets: Tensor | None = None
    outlier_columns: Tensor | None = None
    outlier_values: Tensor | None = None
    scale_quantized: list[Triple] | None = None
    zero_quantized: list[Triple] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        rows, columns = self.shape
        outliers = self._outliers()
        offsets, places, values = outliers
        for argument, tensor in (("outlier_offsets", offsets), ("outlier_columns", places)):
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
                raise _checks.bad_type(name, argument, "a tensor of int64", tensor)
        _checks.floating(name, "outlier_values", values)
        _checks.shape(name, "outlier_offsets", offsets, (rows + 1,))
        _checks.shape(name, "outlier_columns", places, (len(values),))
        if not _checks.has_values(places):
            return
        if offsets[0] != 0 or offsets[-1] != len(values) or (offsets.diff() < 0).any():
            raise ValueError(f"{name}: outlier_offsets must rise from 0 to {len(values)}")
        if len(values) and not ((places >= 0) & (places < columns)).all():
            raise ValueError(f"{name}: outlier_columns must be from 0 to {columns - 1}")

    def _outliers(self) -> Triple:
        found = self.outlier_offsets, self.outlier_columns, self.outlier_values
        return found  # type: ignore[return-value]

    def _places(self) -> tuple[Tensor, Tensor]:
        """The row and the column of each outlier."""
        offsets, columns, _ = self._outliers()
        rows = torch.arange(len(offsets) - 1, device=offsets.device)
        return rows.repeat_interleave(offsets.diff(), output_size=len(columns)), columns

    @property
    def outlier_mask(self) -> Tensor:
        """Where the outliers are, bool of shape (out, in)."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        rows, columns = self._places()
        return mask.index_put((rows, columns), mask.new_ones(()))

    def _values(self) -> Tensor:
        dense = super()._values()
        *_, values = self._outliers()
        return dense.index_put(self._places(), values.to(dense.dtype))

    def limits(self) -> dict[str, int]:
        """The bounds of the columns."""
        return {"outlier_columns": self.shape[1]}

    def to(self, device: torch.device | str) -> "SpQRTensor":
        """The same on a device.

        Args:
            device: Where its tensors are to lie.

        Returns:
            A copy.
        """
        moved = super().to(device)

        def move(triples: list[Triple] | None) -> list[Triple] | None:
            if triples is None:
                return None
            return [
                (one.to(device), two.to(device), three.to(device)) for one, two, three in triples
            ]

        return replace(
            moved,
            scale_quantized=move(self.scale_quantized),
            zero_quantized=move(self.zero_quantized),
        )


class _SparseRounding(GridRounding):
    """Rounds to the levels of small groups, and leaves what costs too much as it is."""

    def __init__(
        self,
        problem: Problem,
        *,
        threshold: float,
        leave_one_out: bool,
        scale_bits: int | None,
        zero_bits: int | None,
        run: int,
        **options: Any,
    ) -> None:
        super().__init__(problem, scales="fresh", **options)
        columns, costs = problem.columns, problem.costs
        self._limit = math.inf
        if threshold < math.inf:
            spread = columns.var(1) if columns.shape[1] > 1 else torch.zeros_like(costs)
            self._limit = threshold * float((spread * costs).mean())
        self._leaves_out = leave_one_out and self._limit < math.inf
        self._bits_of = {"scale": scale_bits, "zero": zero_bits}
        self._run = run
        self.triples: dict[str, list[Triple]] = {"scale": [], "zero": []}
        self.is_outlier = torch.zeros_like(columns, dtype=torch.bool)
        self.kept = torch.zeros_like(columns)

    def fitted(self, position: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The grids of a group, without its outliers, and quantized themselves."""
        if self._leaves_out and weight.shape[1] > 1:
            others = ~self._candidates(position, weight)
            count = others.sum(1, keepdim=True)
            mean = (weight * others).sum(1, keepdim=True) / count.clamp(min=1)
            weight = weight.where(others, mean)
        scale, zero_point = super().fitted(position, weight)
        return self._quantized("scale", scale), self._quantized("zero", zero_point)

    def _candidates(self, position: int, weight: Tensor) -> Tensor:
        """Entries without which the row's grid makes an error smaller by more than the limit."""
        rows, size = weight.shape
        costs = self.problem.costs[position : position + size]
        whole = self._error(weight, costs)
        others = torch.arange(size - 1, device=weight.device).repeat(size, 1)
        others += others >= torch.arange(size, device=weight.device).unsqueeze(1)
        parts = []
        for chosen in torch.split(others, max(_ELEMENTS // (rows * size), 1)):
            left = weight[:, chosen].reshape(-1, size - 1)
            weights_of = costs[chosen].expand(rows, -1, -1).reshape(-1, size - 1)
            parts.append(self._error(left, weights_of).reshape(rows, -1))
        return whole.unsqueeze(1) - torch.cat(parts, 1) > self._limit

    def _error(self, weight: Tensor, costs: Tensor) -> Tensor:
        """The cost of rounding each row with a grid of its own."""
        scale, zero_point = fit_grid(weight, **self.options)  # type: ignore[arg-type]
        options = {"bits": self.options["bits"], "scheme": self.options["scheme"]}
        codes = quantize_affine(weight, scale, zero_point, **options)  # type: ignore[arg-type]
        return ((dequantize_affine(codes, scale, zero_point) - weight).square() * costs).sum(1)

    def _quantized(self, which: str, values: Tensor) -> Tensor:
        """Statistics of the rows of a group, which are codes themselves; those codes are kept."""
        bits = self._bits_of[which]
        if bits is None:
            return values
        rounded = rtn_quantize(
            values.unsqueeze(0), bits=bits, group_size=self._run, scheme="minmax"
        )
        parts = rounded.codes, rounded.scale, rounded.zero_point
        self.triples[which].append(tuple(part.squeeze(0) for part in parts))  # type: ignore[arg-type]
        return rounded.dequantize(values.dtype).squeeze(0)

    def round(self, position: int, column: Tensor) -> Tensor:
        """Round a column; what costs more than the limit stays, with the code of 0."""
        values = super().round(position, column)
        if self._limit == math.inf:
            return values
        is_outlier = (column - values).square() * self.problem.costs[position] > self._limit
        _, zero_point = self.grid(position)
        of_zero = zero_point.round().clamp(*self.range).to(torch.uint8)
        self._codes[position] = of_zero.where(is_outlier, self._codes[position])
        self.is_outlier[position] = is_outlier
        self.kept[position] = column
        return column.where(is_outlier, values)


@_PAPER
@torch.no_grad()
@without_autocast
def spqr_quantize(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 3,
    group_size: int | None = 16,
    outlier_threshold: float = 0.2,
    act_order: bool = False,
    scheme: str = "minmax",
    scale_bits: int | None = 3,
    zero_bits: int | None = 3,
    statistics_group_size: int = 16,
    leave_one_out: bool = True,
    block_size: int = 128,
    damp: float = 0.01,
) -> SpQRTensor:
    r"""GPTQ with small groups, whose scales are quantized too, and with sparse outliers.

    The sweep is that of :func:`gptq_quantize` with ``scales="fresh"``, where :math:`U` is. With

    .. math::

        \tau = \texttt{outlier\_threshold} \cdot \operatorname*{mean}_j
        \frac{\mathrm{Var}_o(W_{oj})}{U_{jj}^2}

    a weight whose error :math:`(w - \hat w)^2 / U_{jj}^2` is above :math:`\tau` at its turn stays
    as it is then, an outlier. Where a group begins, ``leave_one_out`` finds the entries without
    which the row's grid would make an error that is smaller by more than :math:`\tau`, and grids
    are fitted with the mean of the others in their places. Scales and zero-points of the rows of a
    group are then rounded to codes themselves, in runs of ``statistics_group_size`` rows.

    Args:
        weight: Weights :math:`W`, of shape (out, in).
        hessian: As of :class:`HessianAccumulator`, of shape (in, in), symmetric.
        bits: Bits of a code, from 1 to 8; at least 2 for ``"symmetric"`` and ``"restricted"``.
        group_size: Weights of a group; None is a whole row.
        outlier_threshold: At least 0, where all inexact weights are outliers; none are with inf.
        act_order: Whether important columns come first.
        scheme: ``"asymmetric"``, ``"symmetric"``, ``"restricted"`` or ``"minmax"``, as of
            :func:`fit_grid`.
        scale_bits: Bits of the code of a scale, from 1 to 8; None leaves them.
        zero_bits: Bits of the code of a zero-point, from 1 to 8; None leaves them.
        statistics_group_size: Rows whose scales share a grid.
        leave_one_out: Whether grids are fitted without outliers.
        block_size: Columns that are computed together; changes nothing but speed.
        damp: What is added to the diagonal of the Hessian, in units of its mean, at least 0.

    Returns:
        The quantized weights; they dequantize to the dtype of ``weight``.

    Raises:
        ValueError: A tensor is not of the shape above or not finite, the damped Hessian is not
            positive definite, or an option is not one of those above.
        TypeError: A tensor is not of a real floating dtype, or an option of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.quant import spqr_quantize
        >>> _ = torch.manual_seed(0)
        >>> weight = torch.randn(32, 32)
        >>> weight[3, 5] = 30.0
        >>> quantized = spqr_quantize(weight, torch.eye(32), outlier_threshold=1.0)
        >>> quantized.outlier_mask.nonzero()
        tensor([[3, 5]])

    Deviations:
        A group that reaches beyond a block is fitted to weights with all errors made up for; the
        released code does so only where groups divide blocks. Equal scales are represented
        exactly. An outlier has the value of its turn, after earlier errors were made up for.

    Reference:
        As :class:`SpQRTensor`.
    """
    name = "spqr_quantize"
    check_weight(name, weight)
    check_hessian(name, hessian, weight.shape[1])
    check_grid_options(name, bits=bits, group_size=group_size, scheme=scheme)
    if not _checks.number(name, "outlier_threshold", outlier_threshold) >= 0:
        raise _checks.bad_value(name, "outlier_threshold", "at least 0", outlier_threshold)
    for argument, value in (("scale_bits", scale_bits), ("zero_bits", zero_bits)):
        if value is not None:
            check_bits(name, value, argument=argument)
    _checks.count(name, "statistics_group_size", statistics_group_size)
    _checks.count(name, "block_size", block_size)
    _checks.at_least(name, "damp", damp, 0)
    _checks.same_device(name, weight=weight, hessian=hessian)
    problem = prepare(name, weight, hessian, damp, act_order=act_order)
    size = weight.shape[1] if group_size is None else group_size
    rounding = _SparseRounding(
        problem,
        threshold=outlier_threshold,
        leave_one_out=leave_one_out,
        scale_bits=scale_bits,
        zero_bits=zero_bits,
        run=statistics_group_size,
        bits=bits,
        group_size=size,
        scheme=scheme,
    )
    sweep(problem, rounding, blocks(weight.shape[1], block_size, size))
    dense = rounding.result(weight.dtype)
    is_outlier, values = (problem.restored(one) for one in (rounding.is_outlier, rounding.kept))
    options = {field.name: getattr(dense, field.name) for field in fields(dense)}
    options |= {"group_size": group_size}
    if group_size is None:
        options["group_index"] = None
    offsets = torch.zeros(len(weight) + 1, dtype=torch.int64, device=weight.device)
    offsets[1:] = is_outlier.sum(1).cumsum(0)
    return SpQRTensor(
        **options,
        outlier_offsets=offsets,
        outlier_columns=is_outlier.nonzero()[:, 1],
        outlier_values=values[is_outlier],
        scale_quantized=None if scale_bits is None else rounding.triples["scale"],
        zero_quantized=None if zero_bits is None else rounding.triples["zero"],
    )
