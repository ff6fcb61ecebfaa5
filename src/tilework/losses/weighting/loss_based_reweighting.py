"""Weights of samples from their losses."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework._options import OptionsModule
from tilework.catalog import implements
from tilework.losses._classes import class_index

__all__ = ["LossBasedReweighting", "loss_based_reweighting", "loss_based_weights"]

STRATEGIES = ("linupper", "quadratic", "extremes", "uniform")
_NAME = "loss_based_reweighting"
_SMALLEST_RANGE = 1e-6
_PAPER = implements(
    "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining",
    year=2025,
    arxiv="2502.06733",
)


@_PAPER
def loss_based_weights(
    losses: Float[Tensor, " batch"],
    *,
    strategy: str = "linupper",
    delta: float = 1.0,
    temperature: float = 1.0,
) -> Float[Tensor, " batch"]:
    r"""Weights of samples that follow from their losses, and sum to 1.

    With the ``losses`` :math:`\ell_i`, their least and largest, :math:`\delta` = ``delta`` and
    :math:`r` = ``temperature``:

    .. math::

        h_i = \delta \, \frac{2 \ell_i - \ell_{\max} - \ell_{\min}}
            {\max(\ell_{\max} - \ell_{\min},\ 10^{-6})}, \qquad
        w = \mathrm{softmax}(s / r)

    with the score :math:`s_i` of the strategy: ``"linupper"`` :math:`\min(h_i + \delta, \delta)`,
    which lowers the weight of small losses; ``"quadratic"`` :math:`1 - h_i^2 / \delta^2`, which
    lowers that of both ends; ``"extremes"`` :math:`|h_i|`, which raises it; ``"uniform"`` 0. The
    weights have no gradient.

    Args:
        losses: The loss of each sample, shape ``(B)``, ``B >= 1``.
        strategy: ``"linupper"``, ``"quadratic"``, ``"extremes"`` or ``"uniform"``.
        delta: Half the range of the normalized losses, above 0.
        temperature: What scores are divided by, above 0: the larger, the more equal the weights.

    Returns:
        Shape ``(B)``, of the dtype of ``losses``, for half precision under autocast float32.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``losses`` is not of a floating dtype.

    Example:
        >>> import torch
        >>> from tilework.losses import loss_based_weights
        >>> loss_based_weights(torch.tensor([1.0, 2.0, 3.0]))
        tensor([0.1554, 0.4223, 0.4223])

    Deviations:
        A released port gives ``"uniform"`` the scores :math:`h`, whose weights are not equal.

    Reference:
        Daouda Sow, Herbert Woisetschläger, Saikiran Bulusu, Shiqiang Wang, Hans-Arno Jacobsen,
        Yingbin Liang. Dynamic Loss-Based Sample Reweighting for Improved Large Language Model
        Pretraining. 2025. arXiv:2502.06733.
    """
    _check("loss_based_weights", losses, strategy, delta, temperature)
    return _weights(losses, strategy, delta, temperature).to(class_index.result_dtype(losses))


@_PAPER
def loss_based_reweighting(
    losses: Float[Tensor, " batch"],
    *,
    strategy: str = "linupper",
    delta: float = 1.0,
    temperature: float = 1.0,
    group: Any = None,
) -> Float[Tensor, ""]:
    r"""Sum of the losses of samples, weighted by :func:`loss_based_weights`.

    .. math::

        \sum_{i=1}^{B} w_i \, \ell_i

    with the gradient :math:`w_i`. With a process ``group`` the weights are those among the losses
    of all processes, and each process returns its part of the sum times their number, so that the
    average of their gradients is the gradient of the whole sum.

    Args:
        losses: The loss of each sample, shape ``(B)``, ``B >= 1``, the same in each process.
        strategy: ``"linupper"``, ``"quadratic"``, ``"extremes"`` or ``"uniform"``.
        delta: Half the range of the normalized losses, above 0.
        temperature: What scores are divided by, above 0. The paper lowers it during training.
        group: The processes whose samples are weighted together; None for this one alone.

    Returns:
        A scalar of the dtype of ``losses``, for half precision under autocast float32.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``losses`` is not of a floating dtype, or ``group`` is no process group.

    Example:
        >>> import torch
        >>> from tilework.losses import loss_based_reweighting
        >>> loss_based_reweighting(torch.tensor([1.0, 2.0, 3.0]))
        tensor(2.2670)

    Deviations:
        As :func:`loss_based_weights`.

    Reference:
        As :func:`loss_based_weights`.
    """
    _check(_NAME, losses, strategy, delta, temperature, group)
    values = losses.to(computation_dtype(losses.dtype))
    if group is None:
        total = (_weights(losses, strategy, delta, temperature) * values).sum()
    else:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        gathered = [torch.empty_like(values) for _ in range(size)]
        dist.all_gather(gathered, values.detach().contiguous(), group)
        weights = _weights(torch.cat(gathered), strategy, delta, temperature).chunk(size)[rank]
        total = size * (weights * values).sum()
    return total.to(class_index.result_dtype(losses))


@_PAPER
class LossBasedReweighting(OptionsModule):
    """:func:`loss_based_reweighting` as a module; its ``temperature`` may be set between calls.

    Example:
        >>> import torch
        >>> from tilework.losses import LossBasedReweighting
        >>> criterion = LossBasedReweighting(temperature=1e6)
        >>> criterion(torch.tensor([1.0, 2.0, 3.0]))
        tensor(2.0000)
        >>> criterion.temperature = 0.1
    """

    strategy: str = "linupper"
    delta: float = 1.0
    temperature: float = 1.0
    group: Any = None

    def _check(self) -> None:
        _check_options(_NAME, **self.options())

    def forward(self, losses: Tensor) -> Tensor:
        """Return the weighted sum; shapes as in :func:`loss_based_reweighting`."""
        return loss_based_reweighting(losses, **self.options())


def _weights(losses: Tensor, strategy: str, delta: float, temperature: float) -> Tensor:
    losses = losses.detach().to(computation_dtype(losses.dtype))
    least, largest = losses.aminmax()
    width = (largest - least).clamp(min=_SMALLEST_RANGE)
    normalized = delta * ((losses - largest) + (losses - least)) / width
    if strategy == "linupper":
        scores = (normalized + delta).clamp(max=delta)
    elif strategy == "quadratic":
        scores = 1 - (normalized / delta).square()
    elif strategy == "extremes":
        scores = normalized.abs()
    else:
        scores = 0 * normalized
    return (scores / temperature).softmax(0)


def _check(
    function: str,
    losses: Tensor,
    strategy: str,
    delta: float,
    temperature: float,
    group: Any = None,
) -> None:
    _check_options(function, strategy, delta, temperature, group)
    _checks.floating(function, "losses", losses)
    if losses.dim() != 1 or losses.shape[0] == 0:
        raise _checks.bad_value(function, "losses", "of shape (B), B >= 1", losses)


def _check_options(
    function: str, strategy: str, delta: float, temperature: float, group: Any
) -> None:
    _checks.one_of(function, "strategy", strategy, STRATEGIES)
    _checks.positive(function, "delta", delta)
    _checks.positive(function, "temperature", temperature)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise _checks.bad_type(function, "group", "a process group or None", group)
