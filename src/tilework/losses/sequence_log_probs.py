"""Log-probabilities of sequences from those of their tokens."""

from jaxtyping import Float, Int64
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements
from tilework.losses._classes import class_index

__all__ = ["sequence_log_probs"]

_NAME = "sequence_log_probs"


@implements(
    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    year=2023,
    arxiv="2305.18290",
)
def sequence_log_probs(
    log_prob: Float[Tensor, "batch tokens"],
    target: Int64[Tensor, "batch tokens"],
    *,
    ignore_index: int = -100,
    average: bool = False,
) -> Float[Tensor, " batch"]:
    r"""Sum, or average, the log-probabilities of the kept tokens of each sequence.

    With :math:`K_b` the positions whose ``target`` is not ``ignore_index``:

    .. math::

        s_b = \sum_{t \in K_b} \mathrm{log\_prob}_{bt}, \qquad
        \text{or } s_b / |K_b| \text{ with } \texttt{average}

    A sequence of which nothing is kept gives 0. Summed in float32 or better.

    Args:
        log_prob: Log-probability of each token, shape ``(B, T)``, as
            :func:`~tilework.losses.linear_log_probs` returns it. Not read where ignored.
        target: The tokens, int64 of shape ``(B, T)``.
        ignore_index: Tokens of this value do not count.
        average: Whether to divide by the number of kept tokens.

    Returns:
        Shape ``(B)``, of the dtype of ``log_prob``.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``log_prob`` is not of a floating dtype, or ``target`` is not int64.

    Example:
        >>> import torch
        >>> from tilework.losses import sequence_log_probs
        >>> log_prob = torch.tensor([[-1.0, -2.0, -5.0], [-3.0, -1.0, -2.0]])
        >>> target = torch.tensor([[7, 4, -100], [2, 2, 9]])
        >>> sequence_log_probs(log_prob, target)
        tensor([-3., -6.])
        >>> sequence_log_probs(log_prob, target, average=True)
        tensor([-1.5000, -2.0000])

    Deviations:
        The paper sums; averages are what later preference losses divide by.

    Reference:
        Rafael Rafailov, Archit Sharma, Eric Mitchell, Stefano Ermon, Christopher D. Manning,
        Chelsea Finn. Direct Preference Optimization: Your Language Model is Secretly a Reward
        Model. 2023. arXiv:2305.18290.
    """
    _checks.floating(_NAME, "log_prob", log_prob)
    if log_prob.dim() != 2:
        raise _checks.bad_value(_NAME, "log_prob", "of shape (B, T)", log_prob)
    class_index.check_target(_NAME, "target", target, tuple(log_prob.shape))
    _checks.integer(_NAME, "ignore_index", ignore_index)
    if not isinstance(average, bool):
        raise _checks.bad_type(_NAME, "average", "a bool", average)
    _checks.same_device(_NAME, log_prob=log_prob, target=target)
    kept = target != ignore_index
    dtype = computation_dtype(log_prob.dtype)
    total = log_prob.to(dtype).where(kept, 0).sum(1)
    if average:
        total = total / kept.sum(1).clamp(min=1)
    return total.to(log_prob.dtype)
