"""Reductions of the map of attention by their definitions. All scores are stored.

The scores of a head are ``s_ij = scale * q_i k_j``; its map under a log-sum-exp is ``p_ij =
exp(s_ij - lse_i)``, 0 where a key is not seen and where ``lse_i`` is -inf.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework._operators import computation_dtype, without_autocast


@without_autocast
def attention_lse(query: Tensor, key: Tensor, is_causal: bool, scale: float) -> Tensor:
    """The log-sum-exp of the scores of each query."""
    scores, visible = _scores(query, key, is_causal, scale)
    if not scores.shape[-1]:
        return scores.sum(-1) - torch.inf
    return scores.masked_fill(~visible, -torch.inf).logsumexp(-1)


@without_autocast
def attention_entropy(
    query: Tensor, key: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Tensor:
    """The entropy of each query's row; ``lse`` moves with the log-sum-exp of the scores."""
    exact = attention_lse(query, key, is_causal, scale)
    logs, visible = _logs(query, key, lse + (exact - exact.detach()), is_causal, scale)
    weights = logs.masked_fill(~visible, -torch.inf).exp()
    return -(weights * logs.masked_fill(~visible, 0)).sum(-1)


@without_autocast
def attention_column_mass(
    query: Tensor, key: Tensor, lse: Tensor, first_query: int, is_causal: bool, scale: float
) -> Tensor:
    """The sum of each key's column over the queries from ``first_query`` on."""
    return _map(query, key, lse, is_causal, scale)[:, :, first_query:].sum(2)


@without_autocast
def block_pooled_attention(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    block_size: list[int],
    largest: bool,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """The largest entry of each block of the map, or the sum of its entries."""
    weights = _map(query, key, lse, is_causal, scale)
    missing = [-size % block for size, block in zip(weights.shape[2:], block_size, strict=True)]
    blocks = F.pad(weights, (0, missing[1], 0, missing[0]))
    shape = [size // block for size, block in zip(blocks.shape[2:], block_size, strict=True)]
    blocks = blocks.view(*blocks.shape[:2], shape[0], block_size[0], shape[1], block_size[1])
    return blocks.amax((3, 5)) if largest else blocks.sum((3, 5))


def _scores(query: Tensor, key: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The scores of all queries and keys, and which keys each query sees."""
    dtype = computation_dtype(query.dtype)
    keys = key.to(dtype).repeat_interleave(query.shape[1] // max(1, key.shape[1]), 1)
    scores = scale * (query.to(dtype) @ keys.mT)
    visible = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
    return scores, visible.tril() if is_causal else visible


def _logs(
    query: Tensor, key: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The logarithm of the map where it is not 0, and where that is."""
    scores, visible = _scores(query, key, is_causal, scale)
    blind = (lse == -torch.inf)[..., None]
    return scores - lse[..., None].masked_fill(blind, 0), visible & ~blind


def _map(query: Tensor, key: Tensor, lse: Tensor, is_causal: bool, scale: float) -> Tensor:
    logs, visible = _logs(query, key, lse, is_causal, scale)
    return logs.masked_fill(~visible, -torch.inf).exp()
