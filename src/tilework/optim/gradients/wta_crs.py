"""Products over few sampled rows, and a linear layer that keeps no others for its weight."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tilework import _checks
from tilework._operators import computation_dtype, is_autocast
from tilework.catalog import implements

__all__ = ["WTACRSLinear", "wta_crs_matmul", "wta_crs_sample"]

_TIE = 1e-12  # the relative difference up to which rounding may be what tells two masses apart
_PAPER = implements(
    "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model",
    year=2023,
    arxiv="2305.15265",
)


@_PAPER
def wta_crs_sample(
    probabilities: Float[Tensor, " rows"],
    k: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Int64[Tensor, " samples"], Float[Tensor, " samples"]]:
    r"""Take the most probable rows, and draw others, with weights that make sums unbiased.

    With the ``probabilities`` :math:`p`, divided by their sum, and the sum :math:`P_c` of the
    :math:`c` largest, the winners are these :math:`c` rows, with weight 1, for the

    .. math::

        c \in \{0, \dots, k - 1\} \quad \text{that minimizes} \quad \frac{1 - P_c}{k - c}

    the smallest on ties. The other :math:`k - c` samples are drawn with replacement from the
    remaining rows, a row :math:`j` with probability :math:`p_j / (1 - P_c)`, and weigh

    .. math::

        \frac{1 - P_c}{(k - c) \, p_j}

    so that the weights of each row with :math:`p_i > 0` sum to 1 in expectation. Equal
    probabilities count in the order of rows. If the winners have all the mass, the other samples
    have weight 0. If :math:`k \ge n`, all rows are taken, with weight 1. Drawn in float64.

    Args:
        probabilities: At least 0 and not all 0, shape ``(n)``; they need not sum to 1.
        k: How many rows to take, at least 1.
        generator: Where the draws come from, on the device of ``probabilities``.

    Returns:
        The rows, int64 of shape ``(min(k, n))``, winners first, and their weights, of the dtype of
        ``probabilities``.

    Raises:
        ValueError: A shape or option is not one of those above; on the CPU, a probability is
            negative, or all are 0. Elsewhere all weights of a sample are nan.
        TypeError: An argument is of another type.

    Example:
        >>> import torch
        >>> from tilework.optim import wta_crs_sample
        >>> index, weight = wta_crs_sample(torch.tensor([0.1, 0.7, 0.1, 0.1]), 2)
        >>> index[0], weight
        (tensor(1), tensor([1., 3.]))

    Deviations:
        The released code drops the drawn part where the winners have more than 0.999 of the mass,
        which biases the sum.

    Reference:
        Zirui Liu, Guanchu Wang, Shaochen Zhong, Zhaozhuo Xu, Daochen Zha, Ruixiang Tang, Zhimeng
        Jiang, Kaixiong Zhou, Vipin Chaudhary, Shuai Xu, Xia Hu. Winner-Take-All Column Row Sampling
        for Memory Efficient Adaptation of Language Model. 2023. arXiv:2305.15265.
    """
    name = "wta_crs_sample"
    _checks.count(name, "k", k)
    _checks.floating(name, "probabilities", probabilities)
    if probabilities.dim() != 1:
        raise _checks.bad_value(name, "probabilities", "of shape (n)", probabilities)
    _check_mass(name, "probabilities", probabilities)
    index, weight = _sample(probabilities.detach(), k, generator)
    return index, weight.to(probabilities.dtype)


@_PAPER
def wta_crs_matmul(
    input: Float[Tensor, "rows m"],
    other: Float[Tensor, "rows n"],
    k: int,
    *,
    probabilities: Float[Tensor, " rows"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "m n"]:
    r"""Estimate a product of matrices, a sum over their rows, from few of them.

    With the rows :math:`x_i` of ``input`` and :math:`y_i` of ``other``, and the rows :math:`i_s`
    and weights :math:`w_s` of :func:`wta_crs_sample`:

    .. math::

        \sum_{s=1}^{k} w_s \, x_{i_s} y_{i_s}^\top
        \qquad \text{instead of} \qquad \sum_{i=1}^{n} x_i y_i^\top

    The estimate is unbiased where each row that counts has a probability above 0. Gradients are
    those of the sampled sum; the sample itself is a constant.

    Args:
        input: Shape ``(n, d)``.
        other: Shape ``(n, e)``.
        k: How many rows to take, at least 1; for ``k >= n`` the product is exact.
        probabilities: As in :func:`wta_crs_sample`, shape ``(n)``; None for
            :math:`\lVert x_i \rVert \, \lVert y_i \rVert`, which has the least variance.
        generator: Where the draws come from, on the device of ``input``.

    Returns:
        Shape ``(d, e)``, of the dtype that the two promote to; under autocast as ``torch.matmul``.

    Raises:
        ValueError: A shape or option is not one of those above, or ``probabilities`` as in
            :func:`wta_crs_sample`.
        TypeError: An argument is of another type.

    Example:
        >>> import torch
        >>> from tilework.optim import wta_crs_matmul
        >>> input, other = torch.eye(3), torch.tensor([[5.0], [0.0], [0.0]])
        >>> wta_crs_matmul(input, other, 1)
        tensor([[5.],
                [0.],
                [0.]])

    Deviations:
        As :func:`wta_crs_sample`.

    Reference:
        As :func:`wta_crs_sample`.
    """
    name = "wta_crs_matmul"
    _checks.count(name, "k", k)
    for argument, tensor in (("input", input), ("other", other)):
        _checks.floating(name, argument, tensor)
        if tensor.dim() != 2 or tensor.shape[0] != input.shape[0]:
            raise _checks.bad_value(name, argument, "of 2 dimensions and as many rows", tensor)
    _checks.same_device(name, input=input, other=other, probabilities=probabilities)
    if probabilities is None:
        probabilities = _or_uniform(_norms(input.detach()) * _norms(other.detach()))
    else:
        _checks.floating(name, "probabilities", probabilities)
        _checks.shape(name, "probabilities", probabilities, input.shape[:1])
        _check_mass(name, "probabilities", probabilities)
    index, weight = _sample(probabilities.detach(), k, generator)
    dtype = torch.promote_types(input.dtype, other.dtype)
    rows = _weighted(input.to(dtype), index, weight)
    return rows.mT @ other.to(dtype).index_select(0, index)


@_PAPER
class WTACRSLinear(nn.Linear):
    r"""Linear layer that keeps few rows of its input for the gradient of its weight.

    It stands in place of ``nn.Linear``, with its ``state_dict`` and its output. In training, with
    the input as :math:`n` rows :math:`x_i`, the forward pass draws :math:`k` of them by
    :func:`wta_crs_sample`, with probabilities in proportion to :math:`\lVert x_i \rVert` times the
    row's score (equal ones if all are 0), and keeps these rows times their weights :math:`w_s`.
    With the gradients :math:`\delta_i` of the output's rows, the gradient of the weight is

    .. math::

        \sum_{s=1}^{k} \delta_{i_s} \, (w_s x_{i_s})^\top, \qquad
        k = \min(\max(\lfloor n \cdot \texttt{sample\_ratio} \rfloor, \texttt{min\_samples}), n)

    which is unbiased for scores above 0; those of the input and the bias are exact. In evaluation,
    without gradients, if the weight needs none, or for :math:`k = n`, the layer is the exact one.
    It saves the memory of its input where nothing else keeps that. Second derivatives are those of
    the sampled sum; forward-mode differentiation of a layer that samples is refused.

    Args:
        in_features: Features of the input.
        out_features: Features of the output.
        bias: Whether there is a bias.
        device: Device of the parameters.
        dtype: Their dtype.
        sample_ratio: The part of the rows to keep, above 0 and at most 1.
        min_samples: The least number of rows to keep, at least 1.
        generator: Where the draws come from, on the device of the input. A checkpoint that draws
            again takes others from it, and the same ones from torch's own.

    Raises:
        ValueError: An option, or the shape of ``row_scores``, is not one of those above; on the
            CPU, a score is negative.
        TypeError: An option is of another type, or ``row_scores`` not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.optim import WTACRSLinear
        >>> layer = WTACRSLinear(16, 8, sample_ratio=0.25)
        >>> layer(torch.randn(4, 32, 16)).sum().backward()  # of 128 rows it keeps 32
        >>> layer.weight.grad.shape
        torch.Size([8, 16])

    Deviations:
        The released code takes no account of the probabilities while its cache of norms is all 0,
        which biases the gradient, and keeps rows in half precision.

    Reference:
        As :func:`wta_crs_sample`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        sample_ratio: float = 0.3,
        min_samples: int = 10,
        generator: torch.Generator | None = None,
    ) -> None:
        name = type(self).__name__
        _checks.positive_fraction(name, "sample_ratio", sample_ratio)
        _checks.count(name, "min_samples", min_samples)
        plain = _checks.plain
        super().__init__(plain(in_features), plain(out_features), bias, device, dtype)
        self.sample_ratio: float = plain(sample_ratio)
        self.min_samples: int = plain(min_samples)
        self.generator = generator

    def forward(self, input: Tensor, row_scores: Tensor | None = None) -> Tensor:
        """Return the linear map of the input.

        Args:
            input: Shape ``(..., in_features)``.
            row_scores: What the norms of the rows are multiplied by, at least 0, shape ``(n)``,
                such as the norms that the rows' gradients had an epoch ago; None for 1.

        Returns:
            Shape ``(..., out_features)``.
        """
        rows = math.prod(input.shape[:-1])
        if row_scores is not None:
            self._check_scores(input, rows, row_scores)
        is_trained = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        if not is_trained or (samples := self._samples(rows)) == rows:
            return super().forward(input)
        input, weight, bias = map(_under_autocast, (input, self.weight, self.bias))
        flat = input.reshape(-1, input.shape[-1])
        with torch.no_grad():
            mass = _norms(flat) if row_scores is None else _norms(flat) * row_scores
            index, weights = _sample(_or_uniform(mass), samples, self.generator)
        kept = _weighted(flat, index, weights)
        output: Tensor = _SampledLinear.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, kept, index
        )
        return output

    def _samples(self, rows: int) -> int:
        # Otherwise ``torch.compile`` takes the ratio for a symbol, which a Function cannot.
        numerator, denominator = self.sample_ratio.as_integer_ratio()
        return min(max(int(numerator / denominator * rows), self.min_samples), rows)

    def _check_scores(self, input: Tensor, rows: int, scores: Tensor) -> None:
        name = type(self).__name__
        _checks.floating(name, "row_scores", scores)
        _checks.shape(name, "row_scores", scores, (rows,))
        _checks.same_device(name, input=input, row_scores=scores)
        if _checks.holds_values(scores) and (scores < 0).any():
            raise _checks.bad_value(name, "row_scores", "at least 0 everywhere", scores)

    def extra_repr(self) -> str:
        """Return what ``nn.Linear`` shows, and the layer's own options."""
        own = f"sample_ratio={self.sample_ratio}, min_samples={self.min_samples}"
        return f"{super().extra_repr()}, {own}"


class _SampledLinear(torch.autograd.Function):
    """The exact linear map, with the gradient of its weight from the kept rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, index: Tensor
    ) -> Tensor:
        return F.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, _, kept, index = inputs
        ctx.save_for_backward(weight, kept, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, kept, index = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        return (
            grad @ weight if needs_input else None,
            rows.index_select(0, index).mT @ kept if needs_weight else None,
            rows.sum(0) if needs_bias else None,
            None,
            None,
        )


def _check_mass(name: str, argument: str, values: Tensor) -> None:
    if not _checks.holds_values(values) or not values.numel():
        return
    if (values < 0).any() or not (values != 0).any():
        raise _checks.bad_value(name, argument, "at least 0 everywhere, and not all 0", values)


def _sample(mass: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The rows and their weights in float64, of probabilities that need not sum to 1."""
    n = mass.shape[0]
    rows = torch.arange(n, device=mass.device)
    if k >= n:
        return rows, torch.ones(n, dtype=torch.float64, device=mass.device)
    mass = mass.double()
    mass = (mass / mass.sum()).where((mass >= 0).all(), torch.nan)
    ordered, order = mass.sort(descending=True, stable=True)
    left = ordered.flip(0).cumsum(0).flip(0)[:k]  # without the c largest, for each c
    slots = rows[:k]
    criterion = left / (k - slots)
    is_least = criterion <= criterion.amin() * (1 + _TIE)
    winners = is_least.int().argmax()  # the first
    cumulative = ordered.where(rows >= winners, 0).cumsum(0)
    rest = cumulative[-1]
    # A generator of None is not traced.
    own: dict[str, Any] = {} if generator is None else {"generator": generator}
    uniform = torch.rand(k, dtype=torch.float64, device=mass.device, **own)
    drawn = torch.searchsorted(cumulative, rest * uniform, right=True).clamp(max=n - 1)
    place = slots.where(slots < winners, drawn.where(rest > 0, 0))
    weight = rest / ((k - winners) * ordered[place])
    return order[place], weight.where(slots >= winners, 1)


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=computation_dtype(rows.dtype))
    return norms.double()


def _or_uniform(mass: Tensor) -> Tensor:
    return mass.where((mass != 0).any(), 1)


def _weighted(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The sampled rows times their weights, rounded once."""
    dtype = computation_dtype(rows.dtype)
    return (rows.index_select(0, index).to(dtype) * weight.to(dtype)[:, None]).to(rows.dtype)


def _under_autocast(tensor: Any) -> Any:
    """A tensor as autocast hands it to a product."""
    if tensor is None or not is_autocast(tensor.device.type) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
