"""The divergence between two linear heads by its definition. The logits of both are stored."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework._operators import computation_dtype
from tilework.losses._classes.tiles import NEGLIGIBLE
from tilework.losses.linear_kl_div.common import NEGLIGIBLE_PART, Divergences, Heads


def forward(given: Heads) -> Divergences:
    """The divergences, without the statistics that only other implementations need."""
    counted, temperature, beta = given.counted, given.temperature, given.beta
    dtype = computation_dtype(given.student_input.dtype)

    def log_probabilities(
        input: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
    ) -> Tensor:
        hidden = input.to(dtype).where(counted[:, None], 0)
        logits = F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        return (logits / temperature).log_softmax(-1)

    log_p, log_q = log_probabilities(*given.student), log_probabilities(*given.teacher)
    if given.divergence == "forward":
        result = _kl_div(log_q, log_p)
    elif given.divergence == "reverse":
        result = _kl_div(log_p, log_q)
    else:
        # The difference of two logarithms of 0 is nan, and so is its derivative.
        log_p, log_q = log_p.clamp(min=NEGLIGIBLE), log_q.clamp(min=NEGLIGIBLE)
        to_p, to_q = _log_mixture(log_q - log_p, beta), _log_mixture(log_p - log_q, 1 - beta)
        result = -(beta * log_q.exp() * to_q + (1 - beta) * log_p.exp() * to_p).sum(-1)
    return Divergences(result.where(counted, 0), result.new_empty(0))


def _kl_div(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``sum(p * (log p - log q))`` of each row, over the classes that are possible under p."""
    # A probability that underflows still makes an infinite difference infinite.
    p = log_p.exp().clamp(min=torch.finfo(log_p.dtype).tiny)
    return (p * (log_p - log_q).where(log_p != -torch.inf, 0)).sum(-1)


def _log_mixture(gains: Tensor, share: float) -> Tensor:
    """``log m - log p`` for ``m = share * q + (1 - share) * p`` and ``gains = log q - log p``."""
    gains = gains.clamp(max=NEGLIGIBLE_PART)
    near = share * gains.expm1()
    far = share * gains.exp() + (1 - share)
    # The first is exact around 0, the second where m is far below p.
    return torch.where(near > -0.5, near.clamp(min=-0.5).log1p(), far.log())
