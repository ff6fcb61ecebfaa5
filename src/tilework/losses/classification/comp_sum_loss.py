"""Comp-sum losses: one family of sum-exponential, cross-entropy, its generalization and MAE."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tilework import _checks
from tilework._implementations import TABLES
from tilework._options import OptionsModule, buffer
from tilework.catalog import implements
from tilework.losses._classes import class_index, linear, logits
from tilework.losses._classes.positions import of_head, of_logits
from tilework.losses._classes.sharding import VocabShard
from tilework.losses._classes.statistics import Rows, Statistics, formula

__all__ = [
    "CompSumLoss",
    "comp_sum_loss",
    "linear_comp_sum_loss",
    "smooth_adversarial_comp_sum_loss",
]

_NAME = "comp_sum_loss"
_ADVERSARIAL = "smooth_adversarial_comp_sum_loss"
_LINEAR = "linear_comp_sum_loss"
TABLES |= {f"losses.{_NAME}": logits.IMPLEMENTATIONS, f"losses.{_LINEAR}": linear.IMPLEMENTATIONS}
_PAPER = implements(
    "Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
    year=2023,
    arxiv="2304.07288",
)


@_PAPER
def comp_sum_loss(
    input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."],
    weight: Float[Tensor, " classes"] | None = None,
    *,
    tau: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Cross-entropy, and what a power of the target's probability makes of it.

    With the logits :math:`z_i` of a position of ``input``, its class :math:`y_i` in ``target``,
    :math:`\tau` = ``tau`` and :math:`w` = ``weight``:

    .. math::

        u_i = \sum_{j \ne y_i} e^{z_{ij} - z_{i y_i}}, \qquad
        \ell_i = w_{y_i} \Phi_\tau(u_i), \qquad
        \Phi_\tau(u) = \begin{cases}
            \log (1 + u) & \tau = 1 \\
            \frac{(1 + u)^{1 - \tau} - 1}{1 - \tau} & \text{otherwise}
        \end{cases}

    :math:`1 / (1 + u)` is the probability :math:`p` of the target: :math:`\tau = 0` is the
    sum-exponential loss :math:`u`, 1 cross-entropy, between 1 and 2 generalized cross-entropy
    :math:`(1 - p^q) / q` with :math:`q = \tau - 1`, and 2 the mean absolute error :math:`1 - p`.
    ``"mean"`` is :math:`\sum_i \ell_i / \sum_i w_{y_i}` over the kept positions.

    Args:
        input: Logits, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        target: Classes, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``.
        weight: A weight for each class, shape ``(C)``; a constant.
        tau: Which loss of the family, at least 0; below 1 the loss of a position is infinite where
            it exceeds the range of the dtype, and its gradient is not finite.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target`` with zeros where ignored; of the dtype
        of ``input``, for half precision under autocast float32. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape or option is not one of those above, or ``weight`` requires a gradient.
        TypeError: ``input`` is not of a floating dtype, or ``target`` is not int64.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import comp_sum_loss
        >>> input, target = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([1])
        >>> [round(comp_sum_loss(input, target, tau=tau).item(), 4) for tau in (0.0, 1.0, 2.0)]
        [2.0, 1.0986, 0.6667]

    Deviations:
        ``weight`` and ``ignore_index`` are those of ``F.cross_entropy``; the paper has neither.

    Reference:
        Anqi Mao, Mehryar Mohri, Yutao Zhong. Cross-Entropy Loss Functions: Theoretical Analysis
        and Applications. 2023. arXiv:2304.07288.
    """
    _check_options(_NAME, tau, ignore_index, reduction)
    positions = of_logits(_NAME, input, target, ignore_index, weight=weight)
    return positions.loss(_NAME, (tau,), reduction)


@formula(_NAME)
def _comp_sum(statistics: Statistics, rows: Rows, tau: float) -> Tensor:
    return rows.target_weight * _phi(statistics.nll, tau)


@_PAPER
class CompSumLoss(OptionsModule):
    """:func:`comp_sum_loss` as a module.

    Example:
        >>> import torch
        >>> from tilework.losses import CompSumLoss
        >>> criterion = CompSumLoss(tau=2.0)
        >>> criterion(torch.zeros(4, 10), torch.tensor([1, 2, 3, 4]))
        tensor(0.9000)
    """

    weight: Tensor | None = buffer(default=None, kw_only=False)
    tau: float = 1.0
    ignore_index: int = -100
    reduction: str = "mean"

    def _check(self) -> None:
        _check_options(_NAME, **self.options())

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss; shapes as in :func:`comp_sum_loss`."""
        return comp_sum_loss(input, target, self.weight, **self.options())


@_PAPER
def linear_comp_sum_loss(
    input: Float[Tensor, "*tokens features"],
    linear_weight: Float[Tensor, "classes features"],
    target: Int64[Tensor, "*tokens"],
    *,
    linear_bias: Float[Tensor, " classes"] | None = None,
    weight: Float[Tensor, " classes"] | None = None,
    tau: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weight: Float[Tensor, "*tokens"] | None = None,
    shift: int = 0,
    implementation: str | None = None,
    vocab_parallel: VocabShard | None = None,
) -> Float[Tensor, "..."]:
    """:func:`comp_sum_loss` of ``F.linear(input, linear_weight, linear_bias)`` without storing it.

    Args:
        input: Hidden states, shape ``(..., D)``, any strides.
        linear_weight: The head's weight, shape ``(V, D)``, of ``input``'s dtype.
        target: Classes, int64 of shape ``(...)``.
        linear_bias: The head's bias, shape ``(V)``, of ``input``'s dtype.
        weight: A weight for each class, shape ``(V)``; a constant.
        tau: Which loss of the family, at least 0.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        token_weight: A weight for each position, of ``target``'s shape, any floating dtype; a
            constant.
        shift: With ``k`` above 0, position ``t`` predicts ``target[..., t + k]``; needs sequences,
            ``input`` of shape ``(..., B, T, D)``.
        implementation: As in :func:`linear_cross_entropy`.
        vocab_parallel: The classes that this process holds of a head spread over processes, as in
            :func:`linear_cross_entropy`.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target`` with zeros where ignored; float32 for
        half-precision input, otherwise of its dtype. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape, option or implementation is not one of those above, or ``weight``
            requires a gradient.
        TypeError: ``target`` is not int64, or the floating dtypes differ outside autocast.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            and gradients are nan.

    Example:
        >>> import torch
        >>> from tilework.losses import linear_comp_sum_loss
        >>> hidden, head = torch.zeros(4, 8), torch.randn(100, 8)
        >>> linear_comp_sum_loss(hidden, head, torch.tensor([3, 99, -100, 0]), tau=2.0)
        tensor(0.9900)

    Deviations:
        As :func:`comp_sum_loss`.

    Reference:
        As :func:`comp_sum_loss`.
    """
    _check_options(_LINEAR, tau, ignore_index, reduction)
    positions = of_head(
        _LINEAR,
        input,
        linear_weight,
        target,
        linear_bias,
        ignore_index,
        implementation,
        weight=weight,
        token_weight=token_weight,
        shift=shift,
        vocab_parallel=vocab_parallel,
        is_sum=reduction != "none",
    )
    return positions.loss(_NAME, (tau,), reduction)


@_PAPER
def smooth_adversarial_comp_sum_loss(
    input: Float[Tensor, "..."],
    adversarial_input: Float[Tensor, "..."],
    target: Int64[Tensor, "..."],
    *,
    tau: float = 1.0,
    rho: float = 1.0,
    nu: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Comp-sum loss, and how far a perturbed example moves the margins of the target.

    With the logits :math:`z_i` of a position of ``input``, :math:`z'_i` of
    ``adversarial_input``, the class :math:`y_i` in ``target``, :math:`\rho` = ``rho``, :math:`\nu`
    = ``nu`` and :math:`\Phi_\tau` of :func:`comp_sum_loss`:

    .. math::

        \ell_i = \Phi_\tau \Big( \sum_{j \ne y_i} e^{(z_{ij} - z_{i y_i}) / \rho} \Big)
            + \nu \| \Delta'_i - \Delta_i \|_2, \qquad
        \Delta_{ij} = z_{i y_i} - z_{ij}, \quad \Delta'_{ij} = z'_{i y_i} - z'_{ij}

    Both inputs have gradients; those of the norm are 0 where it is 0. ``"mean"`` is the mean over
    the kept positions.

    Args:
        input: Logits of the examples, shape ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``.
        adversarial_input: Logits of the perturbed examples that the caller found, of the shape and
            dtype of ``input``.
        target: Classes, int64 of shape ``()``, ``(N)`` or ``(N, d1, ...)``.
        tau: Which loss of the family, at least 0.
        rho: Divisor of the margins, above 0.
        nu: What the norm is multiplied by, at least 0.
        ignore_index: Targets of this value do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or for ``"none"`` the shape of ``target`` with zeros where ignored; of the dtype
        of ``input``, for half precision under autocast float32. ``"mean"`` over nothing is nan.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: ``input`` is not of a floating dtype, ``adversarial_input`` not of that one, or
            ``target`` is not int64.
        IndexError: On the CPU, a target is neither a class nor ``ignore_index``. Elsewhere its loss
            is nan.

    Example:
        >>> import torch
        >>> from tilework.losses import smooth_adversarial_comp_sum_loss
        >>> clean, perturbed = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> smooth_adversarial_comp_sum_loss(clean, perturbed, torch.tensor([0]))  # log(2) + 2
        tensor(2.6931)

    Deviations:
        The paper takes the largest norm over a ball around each example: here that of the example
        that the caller found.

    Reference:
        As :func:`comp_sum_loss`.
    """
    _check_options(_ADVERSARIAL, tau, ignore_index, reduction)
    _checks.positive(_ADVERSARIAL, "rho", rho)
    _checks.at_least(_ADVERSARIAL, "nu", nu, 0)
    class_index.check_input(_ADVERSARIAL, "input", input)
    _checks.floating(_ADVERSARIAL, "adversarial_input", adversarial_input)
    if adversarial_input.dtype != input.dtype:
        accepted = f"of input's {input.dtype}"
        raise _checks.bad_type(_ADVERSARIAL, "adversarial_input", accepted, adversarial_input)
    _checks.shape(_ADVERSARIAL, "adversarial_input", adversarial_input, input.shape)
    _checks.same_device(_ADVERSARIAL, input=input, adversarial_input=adversarial_input)
    positions = class_index.positions(_ADVERSARIAL, input, target, ignore_index)
    perturbed = class_index.positions(_ADVERSARIAL, adversarial_input, target, ignore_index)

    moved = perturbed.logits - positions.logits
    moved = positions.at_target(moved).unsqueeze(positions.dim) - moved
    squares = moved.square().sum(positions.dim)
    apart = squares != 0
    # Not vector_norm, whose second derivative at 0 is nan.
    distance = squares.where(apart, 1).sqrt().where(apart, 0)
    scaled = positions._replace(logits=positions.logits / rho)
    return positions.reduce(_phi(scaled.nll(), tau) + nu * distance, reduction)


def _phi(nll: Tensor, tau: float) -> Tensor:
    """The loss of each position by its negative log-likelihood, which is log(1 + u)."""
    if tau == 1:
        return nll
    power = (1 - tau) * nll
    result = power.expm1()
    if tau > 1:
        # Autograd takes the derivative of expm1 from its value: near -1 there is none of it left.
        result = torch.where(power < -0.5, power.exp() - 1, result)
    return result / (1 - tau)


def _check_options(function: str, tau: float, ignore_index: int, reduction: str) -> None:
    _checks.at_least(function, "tau", tau, 0)
    class_index.check_options(function, ignore_index, reduction)
