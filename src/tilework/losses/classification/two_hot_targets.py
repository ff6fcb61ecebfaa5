"""Values as probabilities of the points around them."""

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements
from tilework.losses.classification import _value_bins

__all__ = ["c51_targets", "two_hot_targets"]

_PAPER = implements(
    "Stop Regressing: Training Value Functions via Classification for Scalable Deep RL",
    year=2024,
    arxiv="2403.03950",
)


@_PAPER
def two_hot_targets(
    target: Float[Tensor, "*batch"], *, min_value: float, max_value: float, num_bins: int
) -> Float[Tensor, "*batch points"]:
    r"""Probabilities of the two points next to each value, whose mean is the value.

    The ``num_bins`` = :math:`m` points are :math:`z_k`, equally spaced from :math:`z_0` =
    ``min_value`` to :math:`z_{m-1}` = ``max_value``. A value :math:`y` of ``target``, clamped to
    them, lies in some :math:`z_k \le y \le z_{k+1}`:

    .. math::

        p_k = \frac{z_{k+1} - y}{z_{k+1} - z_k}, \qquad p_{k+1} = 1 - p_k, \qquad
        0 \text{ elsewhere}

    Args:
        target: Values of any shape.
        min_value: The first point.
        max_value: The last point.
        num_bins: Number of points, at least 2.

    Returns:
        Shape ``(..., num_bins)``, of the dtype of ``target``, without a gradient. Rows sum to 1.

    Raises:
        ValueError: An option is out of range.
        TypeError: ``target`` is not of a floating dtype, or an option is no number.

    Example:
        >>> import torch
        >>> from tilework.losses import two_hot_targets
        >>> two_hot_targets(torch.tensor([0.25, 9.0]), min_value=-1.0, max_value=2.0, num_bins=4)
        tensor([[0.0000, 0.7500, 0.2500, 0.0000],
                [0.0000, 0.0000, 0.0000, 1.0000]])

    Deviations:
        The paper has one symbol for two supports. As in its code, these are points, where
        :func:`hl_gauss_targets` has bins between edges.

    Reference:
        Jesse Farebrother, Jordi Orbay, Quan Vuong, and others. Stop Regressing: Training Value
        Functions via Classification for Scalable Deep RL. 2024. arXiv:2403.03950.
    """
    name = "two_hot_targets"
    _checks.floating(name, "target", target)
    _value_bins.check_range(name, min_value, max_value)
    _checks.count(name, "num_bins", num_bins, 2)
    return _split(target, min_value, max_value, num_bins).to(target.dtype)


@_PAPER
def c51_targets(
    next_probs: Float[Tensor, "*batch points"],
    reward: Float[Tensor, "*batch"],
    *,
    discount: float | Float[Tensor, "*batch"],
    min_value: float,
    max_value: float,
) -> Float[Tensor, "*batch points"]:
    r"""The distribution of a return, projected onto the points of the distribution it came from.

    With the points :math:`z_j` of :func:`two_hot_targets`, their probabilities :math:`p_j` after
    the step in ``next_probs``, :math:`r` = ``reward`` and :math:`\gamma` = ``discount``:

    .. math::

        p'_k = \sum_j p_j \, \mathrm{two\_hot}(r + \gamma z_j)_k

    which clamps :math:`r + \gamma z_j` to the points. Sums are in a fixed order; they take
    ``num_bins**2`` numbers for each row while they are computed.

    Args:
        next_probs: Probabilities of the points, shape ``(..., num_bins)``, ``num_bins >= 2``.
        reward: Rewards, shape ``(...)``.
        discount: One for all, or of shape ``(...)``; 0 where an episode has ended.
        min_value: The first point.
        max_value: The last point.

    Returns:
        Shape ``(..., num_bins)``, of the dtype of ``next_probs``, without a gradient.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: A tensor is not of a floating dtype, or an option is no number.

    Example:
        >>> import torch
        >>> from tilework.losses import c51_targets
        >>> next_probs = torch.tensor([[0.0, 0.0, 1.0, 0.0]])  # surely 1
        >>> reward = torch.tensor([0.25])
        >>> c51_targets(next_probs, reward, discount=0.5, min_value=-1.0, max_value=2.0)
        tensor([[0.0000, 0.2500, 0.7500, 0.0000]])

    Deviations:
        As :func:`two_hot_targets`.

    Reference:
        Marc G. Bellemare, Will Dabney, Rémi Munos. A Distributional Perspective on Reinforcement
        Learning. 2017. arXiv:1707.06887. Compared with others in Jesse Farebrother and others. Stop
        Regressing: Training Value Functions via Classification for Scalable Deep RL. 2024.
        arXiv:2403.03950.
    """
    name = "c51_targets"
    _value_bins.check_input(name, "next_probs", next_probs)
    *batch, num_bins = next_probs.shape
    _checks.floating(name, "reward", reward)
    _checks.shape(name, "reward", reward, batch)
    if isinstance(discount, Tensor):
        _checks.floating(name, "discount", discount)
        _checks.shape(name, "discount", discount, batch)
        _checks.same_device(name, next_probs=next_probs, reward=reward, discount=discount)
        discount = discount.unsqueeze(-1)
    else:
        _checks.number(name, "discount", discount)
        _checks.same_device(name, next_probs=next_probs, reward=reward)
    _value_bins.check_range(name, min_value, max_value)

    dtype = computation_dtype(torch.promote_types(next_probs.dtype, reward.dtype))
    reward = reward.to(dtype).unsqueeze(-1)
    points = _value_bins.ends(reward, min_value, max_value, num_bins - 1)
    moved = _split(reward + discount * points, min_value, max_value, num_bins)
    return (next_probs.detach().unsqueeze(-1) * moved).sum(-2).to(next_probs.dtype)


def _split(target: Tensor, min_value: float, max_value: float, num_bins: int) -> Tensor:
    """Two-hot probabilities in float32 or better: 1 at a point, falling to 0 at its neighbors."""
    gaps = _value_bins.gaps(target, min_value, max_value, num_bins - 1)
    return (1 - gaps.abs() * ((num_bins - 1) / (max_value - min_value))).clamp(min=0)
