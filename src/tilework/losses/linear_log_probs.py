"""Log-probabilities, entropy and argmax of a linear head without its logits."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tilework import _checks
from tilework._implementations import TABLES
from tilework.catalog import implements
from tilework.losses._classes import head
from tilework.losses._classes.linear import IMPLEMENTATIONS
from tilework.losses._classes.positions import of_head
from tilework.losses._classes.sharding import VocabShard

__all__ = ["LinearLogProbs", "linear_log_probs"]

_NAME = "linear_log_probs"
TABLES["losses.linear_log_probs"] = IMPLEMENTATIONS
_PAPER = implements(
    "Cut Your Losses in Large-Vocabulary Language Models", year=2024, arxiv="2411.09009"
)


@_PAPER
class LinearLogProbs(NamedTuple):
    """What :func:`linear_log_probs` returns; every field has the shape of ``target``.

    Args:
        log_prob: Logarithm of the target's probability; 0 where it is ignored.
        lse: Log-sum-exp of the logits.
        entropy: Entropy of the softmax, in nats.
        argmax: The first class of the largest logit, int64.

    Example:
        >>> import torch
        >>> from tilework.losses import linear_log_probs
        >>> result = linear_log_probs(torch.zeros(2, 3), torch.randn(5, 3), torch.tensor([0, 4]))
        >>> result.entropy
        tensor([1.6094, 1.6094])

    Reference:
        As :func:`linear_log_probs`.
    """

    log_prob: Tensor
    lse: Tensor
    entropy: Tensor
    argmax: Tensor


@_PAPER
def linear_log_probs(
    input: Float[Tensor, "*tokens features"],
    linear_weight: Float[Tensor, "classes features"],
    target: Int64[Tensor, "*tokens"],
    *,
    linear_bias: Float[Tensor, " classes"] | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    gradient_filter: float | None = None,
    implementation: str | None = None,
    vocab_parallel: VocabShard | None = None,
) -> LinearLogProbs:
    r"""Log-probability of each target, log-sum-exp, entropy and argmax, in one pass over the head.

    With the row :math:`h_i` of ``input``, :math:`W` = ``linear_weight``, :math:`b` =
    ``linear_bias``, :math:`y_i` = ``target``, :math:`c` = ``softcap`` and :math:`t` =
    ``temperature``:

    .. math::

        a_i &= W h_i + b, \qquad z_i = a_i / t \quad\text{or}\quad c \tanh(a_i / c) / t, \qquad
            p_i = \mathrm{softmax}(z_i) \\
        \mathrm{lse}_i &= \log \sum_v e^{z_{iv}}, \qquad
            \mathrm{log\_prob}_i = z_{i y_i} - \mathrm{lse}_i \\
        \mathrm{entropy}_i &= \mathrm{lse}_i - \sum_v p_{iv} z_{iv}, \qquad
            \mathrm{argmax}_i = \min \{v : a_{iv} = \max_u a_{iu}\}

    The first three are differentiable with respect to ``input``, ``linear_weight`` and
    ``linear_bias``; a field that is not used costs nothing in the backward pass. The logits are not
    stored. Products accumulate in float32 or better, everything after them is computed in float32
    (float64 for float64). Deterministic.

    Args:
        input: Hidden states, shape ``(..., D)``, any strides.
        linear_weight: The head's weight, shape ``(V, D)``, of ``input``'s dtype.
        target: Class indices, int64 of shape ``(...)``.
        linear_bias: The head's bias, shape ``(V)``, of ``input``'s dtype.
        softcap: Bound of the head's output, above 0, applied before the temperature.
        temperature: Divisor of the logits, above 0.
        ignore_index: Where ``target`` has this value, ``log_prob`` is 0 and has no gradient; the
            other fields are computed there too.
        gradient_filter: None is exact. With :math:`\varphi` in (0, 1), the backward pass may leave
            out gradients of logits whose absolute values add up, in each position, to at most
            :math:`\varphi |\gamma| / t` with the gradients :math:`\alpha`, :math:`\beta`,
            :math:`\gamma` of the first three fields, :math:`\varphi |\alpha - \beta| / t` where
            :math:`\gamma = 0`; never that of the target. ``"triton"`` does so, and ``"tiled"`` on
            the CPU.
        implementation: ``"triton"`` (CUDA), ``"tiled"`` or ``"reference"`` (stores the logits).
            ``"chunked"`` stands for the first of these that the device has, as chunks take their
            gradients early, for a loss known beforehand. None picks by device.
        vocab_parallel: The classes that ``linear_weight`` and ``linear_bias`` hold of a head spread
            over processes; ``DTensor`` arguments say this themselves. As in
            :func:`linear_cross_entropy`.

    Returns:
        A :class:`LinearLogProbs` of tensors in the shape of ``target``; float32 for half-precision
        input, otherwise of its dtype, and int64 for ``argmax``.

    Raises:
        ValueError: A shape, option or implementation is not one of those above.
        TypeError: ``target`` is not int64, or the floating dtypes differ outside autocast.
        IndexError: A kept target lies outside ``[0, V)``, on the CPU. Where reading it would
            synchronize (CUDA, ``torch.compile``, ``vmap``) its ``log_prob`` is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import linear_log_probs
        >>> hidden, head = torch.randn(2, 6, 8), torch.randn(100, 8, requires_grad=True)
        >>> tokens = torch.randint(100, (2, 6))
        >>> result = linear_log_probs(hidden, head, tokens, temperature=0.7)
        >>> (result.log_prob.mean() + 0.01 * result.entropy.mean()).backward()
        >>> result.argmax.shape
        torch.Size([2, 6])

    Deviations:
        The paper computes the log-probability alone. A class of logit :math:`-\infty` adds 0 to
        the entropy, where :math:`0 \cdot \infty` would be nan.

    Reference:
        Erik Wijmans, Brody Huval, Alexander Hertzberg, Vladlen Koltun, Philipp Krähenbühl. Cut
        Your Losses in Large-Vocabulary Language Models. 2024. arXiv:2411.09009.
    """
    if softcap is not None:
        _checks.positive(_NAME, "softcap", softcap)
    _checks.positive(_NAME, "temperature", temperature)
    _checks.integer(_NAME, "ignore_index", ignore_index)
    head.check_filter(_NAME, gradient_filter)
    positions = of_head(
        _NAME,
        input,
        linear_weight,
        target,
        linear_bias,
        ignore_index,
        implementation,
        softcap=softcap,
        gradient_filter=gradient_filter,
        vocab_parallel=vocab_parallel,
        is_sum=False,
    )
    statistics = positions.everywhere().statistics(moments=True, temperature=temperature)
    log_prob = (-statistics.nll).where(~positions.weight.isnan(), torch.nan)
    entropy = statistics.total.log() + statistics.moment / statistics.total
    fields = log_prob.where(positions.kept, 0), statistics.lse, entropy, statistics.argmax
    return LinearLogProbs(*map(positions.restored, fields))
