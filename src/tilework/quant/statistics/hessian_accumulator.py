"""The second moments of a layer's inputs, which say how much an error of a weight costs."""

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import without_autocast
from tilework.catalog import without_paper
from tilework.quant._arguments import check_hessian, check_weight, computed

__all__ = ["HessianAccumulator", "hessian_loss"]


@without_paper("the statistics that error-compensated rounding needs")
class HessianAccumulator:
    r"""The Hessian of the squared error of a linear layer's output, from batches of its inputs.

    .. math::

        H = \frac 2 n \sum_i x_i x_i^\top

    over all :math:`n` rows :math:`x_i` that :meth:`update` has seen.

    Args:
        in_features: The length of a row, at least 1.
        device: Where the sums lie; inputs are moved there.
        dtype: What they are computed in, float32, by default, or float64.

    Raises:
        ValueError: ``in_features`` is below 1.
        TypeError: ``in_features`` is not an int, or ``dtype`` neither float32 nor float64.

    Example:
        >>> import torch
        >>> from tilework.quant import HessianAccumulator
        >>> accumulator = HessianAccumulator(2)
        >>> accumulator.update(torch.tensor([[1.0, 0.0]]))
        >>> accumulator.update(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        >>> accumulator.count
        3
        >>> accumulator.hessian
        tensor([[1.3333, 0.0000],
                [0.0000, 2.6667]])

    Deviations:
        The code of GPTQ divides by the number of sequences, not of rows. The algorithms do not
        depend on the scale of the Hessian.

    Reference:
        Elias Frantar, Saleh Ashkboos, Torsten Hoefler, Dan Alistarh. GPTQ: Accurate Post-Training
        Quantization for Generative Pre-trained Transformers. 2022. arXiv:2210.17323.
    """

    def __init__(
        self,
        in_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        _checks.count(name, "in_features", in_features)
        dtype = torch.float32 if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise _checks.bad_type(name, "dtype", "torch.float32 or torch.float64", dtype)
        self.in_features = int(in_features)
        self._sum = torch.zeros(in_features, in_features, device=device, dtype=dtype)
        self._count = 0

    @property
    def count(self) -> int:
        """The number of rows seen."""
        return self._count

    @property
    def hessian(self) -> Tensor:
        """A copy of the Hessian, of shape (in, in); zeros before the first row."""
        return self._sum.clone()

    @torch.no_grad()
    def update(self, input: Tensor) -> None:
        """Add the rows of a batch.

        Args:
            input: Inputs of the layer, of shape (..., in).

        Raises:
            ValueError: The last dimension is another one, or an entry is not finite.
            TypeError: ``input`` is not of a real floating dtype.
        """
        name = type(self).__name__
        _checks.floating(name, "input", input)
        if not input.dim() or input.shape[-1] != self.in_features:
            raise _checks.bad_value(name, "input", f"of shape (..., {self.in_features})", input)
        rows = input.detach().reshape(-1, self.in_features).to(self._sum)
        if not len(rows):
            return
        if _checks.has_values(rows) and not rows.isfinite().all():
            raise ValueError(f"{name}: input must be finite everywhere")
        self._count += len(rows)
        _add_squares(self._sum, rows, self._count)

    def merge(self, other: "HessianAccumulator") -> None:
        """Add all rows that another one has seen.

        Args:
            other: An accumulator for rows of the same length.

        Raises:
            ValueError: ``other`` is for rows of another length.
            TypeError: ``other`` is not a ``HessianAccumulator``.
        """
        name = type(self).__name__
        if not isinstance(other, HessianAccumulator):
            raise _checks.bad_type(name, "other", "a HessianAccumulator", other)
        if other.in_features != self.in_features:
            accepted = f"for rows of length {self.in_features}"
            raise _checks.bad_value(name, "other", accepted, other.in_features)
        if not other.count:
            return
        self._count += other.count
        share = other.count / self._count
        self._sum.mul_(1 - share).add_(other._sum.to(self._sum), alpha=share)


@without_autocast
def _add_squares(total: Tensor, rows: Tensor, count: int) -> None:
    """A step of the mean of squares over ``count`` rows, of which these are the last."""
    total.addmm_(rows.mT, rows, beta=1 - len(rows) / count, alpha=2 / count)


@without_paper("what error-compensated rounding makes small")
@torch.no_grad()
@without_autocast
def hessian_loss(weight: Tensor, quantized_weight: Tensor, hessian: Tensor) -> Tensor:
    r"""The squared error that quantized weights make in a layer's output.

    .. math::

        \mathrm{tr}\big((W - \hat W) H (W - \hat W)^\top\big)

    with ``weight`` :math:`W`, ``quantized_weight`` :math:`\hat W` and ``hessian`` :math:`H`.

    Args:
        weight: Weights, of shape (out, in).
        quantized_weight: The weights in their place, of shape (out, in).
        hessian: As of :class:`HessianAccumulator`, of shape (in, in).

    Returns:
        A scalar, float64 if an argument is, otherwise float32.

    Raises:
        ValueError: A tensor does not fit the others, or has an entry that is not finite.
        TypeError: A tensor is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.quant import hessian_loss
        >>> hessian_loss(torch.ones(1, 2), torch.zeros(1, 2), torch.diag(torch.tensor([1.0, 2.0])))
        tensor(3.)

    Reference:
        Elias Frantar, Saleh Ashkboos, Torsten Hoefler, Dan Alistarh. GPTQ: Accurate Post-Training
        Quantization for Generative Pre-trained Transformers. 2022. arXiv:2210.17323.
    """
    name = "hessian_loss"
    check_weight(name, weight)
    check_weight(name, quantized_weight, "quantized_weight")
    _checks.shape(name, "quantized_weight", quantized_weight, weight.shape)
    check_hessian(name, hessian, weight.shape[1])
    dtype = computed(weight, quantized_weight, hessian)
    difference = weight.to(dtype) - quantized_weight.to(dtype)
    return (difference @ hessian.to(dtype) * difference).sum()
