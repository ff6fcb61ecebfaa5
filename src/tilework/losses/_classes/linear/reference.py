"""The statistics of a linear head's logits, by their definition. The logits are stored."""

import torch.nn.functional as F
from torch import Tensor

from tilework._operators import computation_dtype, without_autocast
from tilework.losses._classes.tiles import Statistics


@without_autocast
def linear_logit_stats(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    class_weight: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    moments: bool,
    gradient_filter: float | None,
) -> Statistics:
    """Return shift, total, target gap, class gap, moment, top and argmax of each row.

    With ``a`` the head's output, the logits ``z`` (``a`` capped, then divided by the temperature)
    and the constant ``shift = max z``: ``total = sum exp(z - shift)``, ``target_gap = shift -
    z[target]`` (nan for a target outside the classes), ``class_gap = sum(class_weight * (shift -
    z))``, zero without ``class_weight``, ``moment = sum(exp(z - shift) * (shift - z))``, ``top =
    max a`` and the first class that has it. The last three are empty without ``moments``. Rows
    whose target is ``ignore_index`` have a total of 1 and 0 elsewhere. ``gradient_filter`` lets an
    implementation leave out small gradients of logits; this one leaves out none.
    """
    dtype = computation_dtype(input.dtype)
    kept = target != ignore_index
    hidden = input.to(dtype).where(kept[:, None], 0)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    output = F.linear(hidden, linear_weight.to(dtype), bias)
    logits = output
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits / temperature

    shift = logits.detach().amax(-1)
    gap = shift[:, None] - logits
    exponentials = gap.neg().exp()
    total = exponentials.sum(-1)
    inside = (target >= 0) & (target < logits.shape[-1])
    target_gap = gap.gather(-1, target.where(inside, 0)[:, None])[:, 0].where(inside, float("nan"))
    class_gap = total * 0 if class_weight is None else gap @ class_weight
    if moments:
        # Classes of a logit of -inf have no part in it.
        moment = (exponentials * gap.where(gap != float("inf"), 0)).sum(-1).where(kept, 0)
        top, argmax = output.detach().max(-1)
    else:
        moment, top, argmax = total[:0], shift[:0], target[:0]
    return (
        shift.where(kept, 0),
        total.where(kept, 1),
        target_gap.where(kept, 0),
        class_gap.where(kept, 0),
        moment,
        top.where(kept, 0) if moments else top,
        argmax.where(kept, 0) if moments else argmax,
    )
