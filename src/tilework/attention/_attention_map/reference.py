"""Reductions of the map of attention by their definitions. All scores are stored.

The scores of a head are ``s_ij = scale * q_i k_j``; its map under a log-sum-exp is ``p_ij =
exp(s_ij - lse_i)``, 0 where a key is not seen and where ``lse_i`` is -inf.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilework._operators import computation_dtype
from tilework.attention._attention_map.common import (
    Blocks,
    Columns,
    Entropy,
    LogSumExp,
    Mass,
    Pooled,
    Queries,
    Rows,
)
from tilework.attention._tensors import scale_of


def attention_lse(given: Queries) -> LogSumExp:
    """The log-sum-exp of the scores of each query."""
    return LogSumExp(_lse(given))


def attention_entropy(given: Rows) -> Entropy:
    """The entropy of each query's row; ``lse`` moves with the log-sum-exp of the scores."""
    dtype = computation_dtype(given.query.dtype)
    # Once, so that gradients by way of the log-sum-exp are rounded together with the others.
    given = given._replace(query=given.query.to(dtype), key=given.key.to(dtype))
    logs, visible = _logs(given)
    total = logs.masked_fill(~visible, -torch.inf).exp().sum(-1)
    # From the same weights as the entropy, so that the parts of its gradient that cancel do.
    moves = total.where((total > 0) & (total < torch.inf), 1).log()
    logs = logs - (moves - moves.detach())[..., None]
    weights = logs.masked_fill(~visible, -torch.inf).exp()
    entropy = -(weights * logs.masked_fill(~visible, 0)).sum(-1)
    return Entropy(entropy, total.detach())


def attention_column_mass(given: Columns) -> Mass:
    """The sum of each key's column over the queries from ``first_query`` on."""
    return Mass(_map(given)[:, :, given.first_query :].sum(2))


def block_pooled_attention(given: Blocks) -> Pooled:
    """The largest entry of each block of the map, or the sum of its entries."""
    weights, block_size = _map(given), (given.height, given.width)
    missing = [-size % block for size, block in zip(weights.shape[2:], block_size, strict=True)]
    blocks = F.pad(weights, (0, missing[1], 0, missing[0]))
    shape = [size // block for size, block in zip(blocks.shape[2:], block_size, strict=True)]
    blocks = blocks.view(*blocks.shape[:2], shape[0], block_size[0], shape[1], block_size[1])
    return Pooled(blocks.amax((3, 5)) if given.largest else blocks.sum((3, 5)))


def _scores(given: Queries | Rows | Columns | Blocks) -> tuple[Tensor, Tensor]:
    """The scores of all queries and keys, and which keys each query sees."""
    query, key = given.query, given.key
    dtype = computation_dtype(query.dtype)
    keys = key.to(dtype).repeat_interleave(query.shape[1] // max(1, key.shape[1]), 1)
    scores = scale_of(given) * (query.to(dtype) @ keys.mT)
    visible = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
    return scores, visible.tril() if given.is_causal else visible


def _lse(given: Queries | Rows) -> Tensor:
    scores, visible = _scores(given)
    if not scores.shape[-1]:
        return scores.sum(-1) - torch.inf
    return scores.masked_fill(~visible, -torch.inf).logsumexp(-1)


def _logs(given: Rows | Columns | Blocks) -> tuple[Tensor, Tensor]:
    """The logarithm of the map where it is not 0, and where that is."""
    scores, visible = _scores(given)
    blind = (given.lse == -torch.inf)[..., None]
    return scores - given.lse[..., None].masked_fill(blind, 0), visible & ~blind


def _map(given: Columns | Blocks) -> Tensor:
    logs, visible = _logs(given)
    return logs.masked_fill(~visible, -torch.inf).exp()
