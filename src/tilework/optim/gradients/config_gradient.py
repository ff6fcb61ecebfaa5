"""One gradient of several losses that conflicts with none of theirs."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype, without_autocast
from tilework.catalog import implements

__all__ = ["MomentumConFIG", "config_gradient"]

LENGTHS = ("projection", "min", "max", "mean", "harmonic", "geometric")
_NAME = "config_gradient"
_PAPER = implements(
    "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
    year=2024,
    arxiv="2408.11104",
)


@_PAPER
def config_gradient(
    grads: Float[Tensor, "losses parameters"] | Sequence[Float[Tensor, " parameters"]],
    *,
    weights: Float[Tensor, " losses"] | None = None,
    length: str = "projection",
) -> Float[Tensor, " parameters"]:
    r"""Combine the gradients of losses so that a step along it lowers each of them.

    With the rows :math:`g_i` of ``grads``, :math:`\hat g_i = g_i / \lVert g_i \rVert` (0 for a zero
    gradient), :math:`w` = ``weights``, by default ones, and the pseudo-inverse:

    .. math::

        u = [\hat g_1; \dots; \hat g_m]^+ \, w, \qquad \hat u = u / \lVert u \rVert, \qquad
        g = \ell \, \hat u

    :math:`u` is the shortest vector whose products with the unit gradients come closest to the
    weights: equal ones for linearly independent gradients and weights of 1. The length :math:`\ell`
    is :math:`\sum_i \langle g_i, \hat u \rangle` for ``"projection"``, otherwise
    :math:`a \sum_i \langle \hat g_i, \hat u \rangle` with the least, the largest or a mean of the
    norms for :math:`a`. The result is 0 where :math:`u` is. Singular values below
    :math:`\max(m, P)` machine epsilons times the largest count as 0. Computed in float32 (float64
    for float64).

    Args:
        grads: A flat gradient for each loss, shape ``(m, P)``, or a sequence of ``m`` of shape
            ``(P)``, ``m >= 1``.
        weights: The share of each loss in the direction, shape ``(m)``.
        length: ``"projection"``, ``"min"``, ``"max"``, ``"mean"``, ``"harmonic"`` or
            ``"geometric"``.

    Returns:
        Shape ``(P)``, of the dtype of ``grads``.

    Raises:
        ValueError: A shape or option is not one of those above.
        TypeError: A tensor is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.optim import config_gradient
        >>> config_gradient(torch.tensor([[2.0, 0.0], [-1.0, 1.0]]))
        tensor([0.5000, 1.2071])

    Deviations:
        The released code solves with a driver that on GPUs assumes full rank; the pseudo-inverse
        does not, which matters where gradients are parallel or zero.

    Reference:
        Qiang Liu, Mengyu Chu, Nils Thuerey. ConFIG: Towards Conflict-free Training of Physics
        Informed Neural Networks. 2024. arXiv:2408.11104.
    """
    _checks.one_of(_NAME, "length", length, LENGTHS)
    rows = {"grads": grads} if isinstance(grads, Tensor) else _named(grads)
    for argument, tensor in rows.items():
        _checks.floating(_NAME, argument, tensor)
    stacked = _stacked(grads)
    dtype = computation_dtype(stacked.dtype)
    if weights is None:
        weights = torch.ones(stacked.shape[0], dtype=dtype, device=stacked.device)
    _checks.floating(_NAME, "weights", weights)
    _checks.shape(_NAME, "weights", weights, stacked.shape[:1])
    _checks.same_device(_NAME, **rows, weights=weights)
    return _combine(stacked.to(dtype), weights.to(dtype), length).to(stacked.dtype)


def _named(grads: Any) -> dict[str, Tensor]:
    if not isinstance(grads, Sequence):
        raise _checks.bad_type(_NAME, "grads", "a tensor or a sequence of such", grads)
    return {f"grads[{index}]": grad for index, grad in enumerate(grads)}


def _stacked(grads: Tensor | Sequence[Tensor]) -> Tensor:
    accepted = "of shape (m, P), or m >= 1 vectors of one size"
    if isinstance(grads, Tensor):
        if grads.dim() != 2 or not grads.shape[0]:
            raise _checks.bad_value(_NAME, "grads", accepted, grads)
        return grads
    if not grads or grads[0].dim() != 1 or any(g.shape != grads[0].shape for g in grads):
        shapes = [tuple(grad.shape) for grad in grads]
        raise ValueError(f"{_NAME}: grads must be {accepted}, got shapes {shapes}")
    return torch.stack(tuple(grads))


@without_autocast
def _combine(grads: Tensor, weights: Tensor, length: str) -> Tensor:
    is_finite = (
        grads.isfinite().all() & weights.isfinite().all()
    )  # the decomposition refuses others
    grads, weights = grads.where(is_finite, 0), weights.where(is_finite, 0)
    norms: Tensor = torch.linalg.vector_norm(grads, dim=1)
    units = grads / norms.where(norms != 0, 1)[:, None]
    direction = _pseudo_solution(units, weights)
    size = torch.linalg.vector_norm(direction)
    direction = direction / size.where(size != 0, 1)
    if length == "projection":
        factor = (grads @ direction).sum()
    else:
        factor = _average(norms, length) * (units @ direction).sum()
    result: Tensor = (factor * direction).where(is_finite, torch.nan)
    return result


def _pseudo_solution(rows: Tensor, values: Tensor) -> Tensor:
    """The shortest vector whose products with the rows come closest to the values."""
    basis, triangle = torch.linalg.qr(rows.mT)  # the small factor has the singular values
    u, singular, vh = torch.linalg.svd(triangle.mT, full_matrices=False)
    least = max(rows.shape) * torch.finfo(rows.dtype).eps * singular[:1]
    inverse = (1 / singular).where(singular > least, 0)
    solution: Tensor = basis @ (vh.mT @ (inverse * (u.mT @ values)))
    return solution


def _average(norms: Tensor, kind: str) -> Tensor:
    if kind == "min":
        return norms.amin()
    if kind == "max":
        return norms.amax()
    if kind == "harmonic":
        return 1 / (1 / norms).mean()
    if kind == "geometric":
        return norms.log().mean().exp()
    return norms.mean()


@_PAPER
class MomentumConFIG:
    r"""Updates from one loss's gradient at a time, by :func:`config_gradient` of their averages.

    A call with the gradient :math:`g` of loss :math:`i`, its :math:`c_i`-th, moves

    .. math::

        m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g, \qquad
        \hat m_j = \frac{m_j}{1 - \beta_1^{c_j}}

    Until each loss has had a call the update is 0. With :math:`t` counting the calls from then on,
    it is

    .. math::

        r = \mathrm{ConFIG}(\hat m_1, \dots, \hat m_m), \qquad
        f = (1 - \beta_1^t) \, r, \qquad
        s \leftarrow \beta_2 s + (1 - \beta_2)
            \Bigl( \frac{f - \beta_1 f_{prev}}{1 - \beta_1} \Bigr)^2, \qquad
        \frac{r}{\sqrt{s / (1 - \beta_2^t)} + \epsilon}

    where the square is that of the gradient of which :math:`f` would be the running mean. The
    update is for plain SGD, as it is scaled like Adam's already. All of it is kept in float32, or
    float64 for gradients in float64.

    Args:
        num_losses: The number ``m`` of losses, at least 1.
        betas: :math:`\beta_1` and :math:`\beta_2`, from 0 to below 1.
        eps: :math:`\epsilon`, at least 0.

    Raises:
        ValueError: An option, index or shape is not one of those above.
        TypeError: A gradient is not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.optim import MomentumConFIG
        >>> config = MomentumConFIG(2)
        >>> config.update(0, torch.tensor([3.0, 0.0]))
        tensor([0., 0.])
        >>> config.update(1, torch.tensor([-1.0, 1.0]))
        tensor([1., 1.])

    Reference:
        As :func:`config_gradient`.
    """

    def __init__(
        self, num_losses: int, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        name = type(self).__name__
        _checks.count(name, "num_losses", num_losses)
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise _checks.bad_value(name, "betas", "two numbers", betas)
        for index, beta in enumerate(betas):
            if not 0 <= _checks.number(name, f"betas[{index}]", beta) < 1:
                accepted = "a number from 0 to below 1"
                raise _checks.bad_value(name, f"betas[{index}]", accepted, beta)
        _checks.at_least(name, "eps", eps, 0)
        self.num_losses = int(num_losses)
        self.betas = (float(betas[0]), float(betas[1]))
        self.eps = float(eps)
        self._counts = [0] * self.num_losses
        self._step = 0
        self._exp_avgs: list[Tensor] = []  # one for each loss, from the first gradient on
        self._running: tuple[Tensor, Tensor] | None = None  # the previous mean, the squares

    @torch.no_grad()
    def update(self, index: int, grad: Tensor) -> Tensor:
        """Take the gradient of one loss, and return the update.

        Args:
            index: The loss, from 0.
            grad: Its flat gradient, shape ``(P)``.

        Returns:
            What to subtract, times the learning rate, from the parameters: shape ``(P)``, of the
            dtype of ``grad``.
        """
        name = type(self).__name__
        if not 0 <= _checks.integer(name, "index", index) < self.num_losses:
            raise _checks.bad_value(name, "index", f"from 0 to {self.num_losses - 1}", index)
        _checks.floating(name, "grad", grad)
        if grad.dim() != 1:
            raise _checks.bad_value(name, "grad", "of shape (P)", grad)
        if self._exp_avgs:
            _checks.shape(name, "grad", grad, self._exp_avgs[0].shape)
        else:
            zeros = torch.zeros_like(grad, dtype=computation_dtype(grad.dtype))
            self._exp_avgs = [zeros] * self.num_losses
            self._running = zeros, zeros
        # The states are never changed in place: a ``state_dict`` stays as it was.
        self._counts[index] += 1
        old = self._exp_avgs[index]
        self._exp_avgs[index] = old.lerp(grad.to(old.dtype), 1 - self.betas[0])
        if self._running is None or 0 in self._counts:
            return torch.zeros_like(grad)
        return self._update(*self._running).to(grad.dtype)

    def _update(self, previous: Tensor, exp_avg_sq: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        self._step += 1
        means = [
            mean / (1 - beta1**count)
            for mean, count in zip(self._exp_avgs, self._counts, strict=True)
        ]
        combined = config_gradient(means)
        mean = (1 - beta1**self._step) * combined
        gradient = (mean - beta1 * previous) / (1 - beta1)
        exp_avg_sq = exp_avg_sq.lerp(gradient.square(), 1 - beta2)
        self._running = mean, exp_avg_sq
        return combined / ((exp_avg_sq / (1 - beta2**self._step)).sqrt() + self.eps)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and averages, which :meth:`load_state_dict` takes."""
        previous, exp_avg_sq = self._running or (None, None)
        return {
            "counts": list(self._counts),
            "step": self._step,
            "exp_avgs": list(self._exp_avgs),
            "previous": previous,
            "exp_avg_sq": exp_avg_sq,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` has returned."""
        counts = state_dict["counts"]
        if len(counts) != self.num_losses:
            accepted = f"that of {self.num_losses} losses"
            raise ValueError(
                f"{type(self).__name__}: state_dict must be {accepted}, got {len(counts)}"
            )
        self._counts = list(counts)
        self._step = state_dict["step"]
        self._exp_avgs = list(state_dict["exp_avgs"])
        running = state_dict["previous"], state_dict["exp_avg_sq"]
        self._running = None if running[0] is None else running
