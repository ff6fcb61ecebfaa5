"""Weighted means of the quantiles of several models."""

from dataclasses import field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tilework import _checks
from tilework._operators import computation_dtype
from tilework._options import OptionsModule
from tilework.catalog import implements

__all__ = ["QuantileAggregator", "aggregate_quantiles"]

_NAME = "aggregate_quantiles"
_PAPER = implements(
    "Flexible Model Aggregation for Quantile Regression", year=2021, arxiv="2103.00083"
)


@_PAPER
def aggregate_quantiles(
    input: Float[Tensor, "*batch models levels"],
    weight_logits: Float[Tensor, "..."],
) -> Float[Tensor, "*batch levels"]:
    r"""Weighted mean of the quantiles that several models predict.

    With the quantiles :math:`q_{pk}` of ``input`` and the ``weight_logits`` :math:`a_{pk}`:

    .. math::

        \bar q_k = \sum_{p=1}^{P} \frac{\exp a_{pk}}{\sum_{r=1}^{P} \exp a_{rk}} \, q_{pk}

    Args:
        input: Quantiles of ``P`` models, shape ``(..., P, K)``, ``P >= 1`` and ``K >= 1``.
        weight_logits: Logits of the models' weights, of at least 2 dimensions that broadcast to
            those of ``input``: ``(P, 1)``, ``(P, K)``, or with leading dimensions.

    Returns:
        Shape ``(..., K)``, of the dtype of ``input``.

    Raises:
        ValueError: A shape is not one of those above.
        TypeError: A tensor is not of a floating dtype.

    Example:
        >>> import torch
        >>> from tilework.losses import aggregate_quantiles
        >>> quantiles = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> aggregate_quantiles(quantiles, torch.zeros(2, 1))
        tensor([2., 4.])

    Deviations:
        Logits of one dimension are refused: ``(P)`` would be read as ``(K)``.

    Reference:
        Rasool Fakoor, Taesup Kim, Jonas Mueller, Alexander J. Smola, Ryan J. Tibshirani. Flexible
        Model Aggregation for Quantile Regression. 2021. arXiv:2103.00083.
    """
    _checks.floating(_NAME, "input", input)
    if input.dim() < 2 or 0 in input.shape[-2:]:
        accepted = "of shape (..., P, K), P >= 1 and K >= 1"
        raise _checks.bad_value(_NAME, "input", accepted, input)
    _checks.floating(_NAME, "weight_logits", weight_logits)
    ours, theirs = tuple(input.shape), tuple(weight_logits.shape)
    fits = all(a in (1, b) for a, b in zip(theirs[::-1], ours[::-1], strict=False))
    if not 2 <= len(theirs) <= len(ours) or not fits:
        accepted = f"of at least 2 dimensions that broadcast to shape {ours}"
        raise _checks.bad_value(_NAME, "weight_logits", accepted, weight_logits)
    _checks.same_device(_NAME, input=input, weight_logits=weight_logits)
    dtype = computation_dtype(input.dtype)
    logits = weight_logits.to(dtype).expand(*theirs[:-2], ours[-2], theirs[-1])
    return (logits.softmax(-2) * input.to(dtype)).sum(-2).to(input.dtype)


@_PAPER
class QuantileAggregator(OptionsModule):
    """:func:`aggregate_quantiles` with weights that are learned, equal at first.

    Its parameter ``weight_logits`` has the shape ``(P, 1)``, with ``per_level`` ``(P, K)``.

    Args:
        num_models: The number ``P`` of models.
        num_levels: The number ``K`` of quantiles.
        per_level: Whether each quantile has weights of its own.

    Raises:
        ValueError: A number is below 1, or ``input`` is not of shape ``(..., P, K)``.
        TypeError: An argument is of a wrong type.

    Example:
        >>> import torch
        >>> from tilework.losses import QuantileAggregator
        >>> aggregator = QuantileAggregator(2, 3)
        >>> aggregator(torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 9.0]])).detach()
        tensor([2., 4., 6.])

    Reference:
        As :func:`aggregate_quantiles`.
    """

    num_models: int = field(kw_only=False)
    num_levels: int = field(kw_only=False)
    per_level: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = self.num_levels if self.per_level else 1
        self.weight_logits = nn.Parameter(torch.empty(self.num_models, levels))
        self.reset_parameters()

    def _check(self) -> None:
        for argument in ("num_models", "num_levels"):
            _checks.count("QuantileAggregator", argument, getattr(self, argument))
        if not isinstance(self.per_level, bool):
            raise _checks.bad_type("QuantileAggregator", "per_level", "a bool", self.per_level)

    def reset_parameters(self) -> None:
        """Give all models the same weight."""
        nn.init.zeros_(self.weight_logits)

    def forward(self, input: Tensor) -> Tensor:
        """Return quantiles of shape ``(..., K)`` for those of shape ``(..., P, K)``."""
        sizes = (self.num_models, self.num_levels)
        if isinstance(input, Tensor) and tuple(input.shape[-2:]) != sizes:
            accepted = f"of shape (..., {sizes[0]}, {sizes[1]})"
            raise _checks.bad_value("QuantileAggregator", "input", accepted, input)
        return aggregate_quantiles(input, self.weight_logits)
