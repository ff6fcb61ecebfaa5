"""Locally typical sampling's filter of next-token logits."""

from dataclasses import field

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements
from tilework.decoding._processor import Processor

__all__ = ["TypicalP", "typical_p"]

_NAME = "typical_p"
_PAPER = implements("Locally Typical Sampling", year=2022, arxiv="2202.00666")


@_PAPER
def typical_p(
    logits: Float[Tensor, "batch vocab"],
    mass: float | Float[Tensor, " batch"] = 0.9,
    *,
    min_tokens_to_keep: int = 1,
) -> Float[Tensor, "batch vocab"]:
    r"""Keep the tokens whose information content is closest to the distribution's entropy.

    With the row :math:`z` of ``logits``, :math:`p = \mathrm{softmax}(z)` and its entropy
    :math:`H`, tokens are ordered by

    .. math::

        d_v = |-\log p_v - H| = \Bigl|z_v - \sum_u p_u z_u\Bigr|,

    equal ones by index. The shortest prefix whose probabilities sum to at least ``mass`` is kept;
    the rest becomes :math:`-\infty`. The most probable token may be among the rest. Distances and
    sums are computed in float32 (float64 for float64 logits).

    Args:
        logits: Unnormalized log-probabilities, shape ``(B, V)``. Tokens at ``-inf`` stay there and
            count as excluded.
        mass: Probability to keep, in (0, 1], for all rows or of shape ``(B)``; the paper takes 0.2
            for stories and 0.95 for summaries. At 1, nothing is excluded.
        min_tokens_to_keep: Keep at least this many tokens, at least 1.

    Returns:
        ``logits``, in their dtype, with ``-inf`` at the excluded tokens. Rows that have no
        distribution, with a nan, an infinity or only ``-inf``, come back as they are.

    Raises:
        ValueError: ``logits`` is not of shape ``(B, V)`` with V >= 1, or ``mass`` or
            ``min_tokens_to_keep`` is out of range. The values of a tensor ``mass`` are read on the
            CPU alone: elsewhere that would synchronize, and those above 1 keep every token, those
            not above 0 keep ``min_tokens_to_keep``.
        TypeError: An argument is of another type.

    Example:
        >>> import torch
        >>> from tilework.decoding import typical_p
        >>> logits = torch.tensor([[0.45, 0.25, 0.15, 0.1, 0.05]]).log()
        >>> typical_p(logits, 0.3).isfinite()
        tensor([[False,  True,  True, False, False]])

    Deviations:
        ``transformers`` keeps all tokens that tie with the last kept one, where here the smaller
        index goes first, and refuses ``mass=1``.

    Reference:
        Clara Meister, Tiago Pimentel, Gian Wiher, Ryan Cotterell. Locally Typical Sampling. 2022.
        arXiv:2202.00666.
    """
    _check_logits(logits)
    _check_options(mass, min_tokens_to_keep, logits.shape[0])

    shifted = logits.detach().to(computation_dtype(logits.dtype))
    shifted = shifted - shifted.amax(1, keepdim=True)
    weight = shifted.exp()
    total = weight.sum(1, keepdim=True)
    mean = (weight * shifted).where(weight > 0, 0).sum(1, keepdim=True) / total
    order = (shifted - mean).abs().sort(dim=1, stable=True).indices
    mass = mass[:, None] if isinstance(mass, Tensor) else float(mass)
    # Negated so that nan, which compares with nothing, excludes nothing.
    missing = ~(weight.gather(1, order).cumsum(1) >= mass * total.double())
    last = (missing | (mass >= 1)).sum(1, keepdim=True).clamp_min(min_tokens_to_keep - 1)
    rank = torch.arange(logits.shape[1], device=logits.device)
    kept = torch.zeros_like(missing).scatter(1, order, rank <= last)
    return logits.masked_fill(~kept, -torch.inf)


@_PAPER
class TypicalP(Processor):
    """:func:`typical_p` as a logits processor, such as ``transformers`` takes.

    Example:
        >>> import torch
        >>> from tilework.decoding import TypicalP
        >>> process = TypicalP(0.2)
        >>> scores = process(torch.zeros(2, 3, dtype=torch.int64), torch.randn(2, 100))
    """

    mass: float | Tensor = field(default=0.9, kw_only=False)
    min_tokens_to_keep: int = 1

    def _check(self) -> None:
        _check_options(self.mass, self.min_tokens_to_keep, None)

    def _filter(self, logits: Tensor) -> Tensor:
        return typical_p(logits, self.mass, **self.options())


def _check_logits(logits: Tensor) -> None:
    _checks.floating(_NAME, "logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise _checks.bad_value(_NAME, "logits", "of shape (B, V), V >= 1", logits)


def _check_options(mass: float | Tensor, min_tokens_to_keep: int, batch: int | None) -> None:
    _checks.count(_NAME, "min_tokens_to_keep", min_tokens_to_keep)
    if not isinstance(mass, Tensor):
        _checks.positive_fraction(_NAME, "mass", mass)
        return
    _checks.floating(_NAME, "mass", mass)
    if mass.dim() != 1 or batch not in (None, mass.shape[0]):
        raise _checks.bad_value(_NAME, "mass", "a number or of shape (B,)", mass)
    if _checks.holds_values(mass):
        outside = mass[~((mass > 0) & (mass <= 1))]
        if len(outside):
            raise _checks.bad_value(_NAME, "mass", _checks.POSITIVE_FRACTION, float(outside[0]))
