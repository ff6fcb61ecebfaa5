"""The statistics of a linear head's logits, by their definition. The logits are stored."""

import torch.nn.functional as F
from torch import Tensor

from tilework._operators import computation_dtype, without_autocast


@without_autocast
def linear_logit_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return shift, total, target gap and class gap of each row; 0, 1, 0, 0 in ignored rows.

    With the logits ``z`` and the constant ``shift = max z``: ``total = sum exp(z - shift)``,
    ``target_gap = shift - z[target]`` (nan for a target outside the classes), and
    ``class_gap = sum(class_weight * (shift - z))``, zero without ``class_weight``.
    """
    dtype = computation_dtype(input.dtype)
    kept = target != ignore_index
    hidden = input.to(dtype).where(kept[:, None], 0)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    logits = F.linear(hidden, linear_weight.to(dtype), bias)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()

    shift = logits.detach().amax(-1)
    gap = shift[:, None] - logits
    total = gap.neg().exp().sum(-1)
    inside = (target >= 0) & (target < logits.shape[-1])
    target_gap = gap.gather(-1, target.where(inside, 0)[:, None])[:, 0].where(inside, float("nan"))
    class_gap = total * 0 if class_weight is None else gap @ class_weight
    return (
        shift.where(kept, 0),
        total.where(kept, 1),
        target_gap.where(kept, 0),
        class_gap.where(kept, 0),
    )
