"""Platt scaling that learns from a stream of binary outcomes."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from tilework import _checks
from tilework._options import StatefulModule, state
from tilework.catalog import implements

__all__ = ["OnlinePlattScaling"]

KINDS = ("platt", "beta")
_NAME = "OnlinePlattScaling"
_TOLERANCE = 1e-12


@implements("Online Platt Scaling with Calibeating", year=2023, arxiv="2305.00070")
class OnlinePlattScaling(StatefulModule):
    r"""Calibrate the probabilities of a binary classifier while its outcomes arrive.

    With the features :math:`x` of a probability :math:`p`, clipped to :math:`[\epsilon, 1 -
    \epsilon]`,

    .. math::

        x = (\mathrm{logit}\, p,\ 1) \ \text{(platt)}, \qquad
        x = (\log p,\ -\log(1 - p),\ 1) \ \text{(beta)}

    the prediction is :math:`\sigma(\theta \cdot x)`, with which :math:`\theta` starts at
    :math:`p` itself. An outcome :math:`y` makes an online Newton step, :math:`\beta` = ``beta``:

    .. math::

        g = (\sigma(\theta \cdot x) - y) \, x, \qquad A \leftarrow A + g g^\top, \qquad
        \theta \leftarrow \theta - A^{-1} g / \beta

    from :math:`A = I / (\beta \, \mathtt{diameter})^2`. A :math:`\theta` longer than ``radius`` is
    replaced by the nearest one of that length, as :math:`A` measures distance. ``theta`` and
    ``matrix`` are float64 buffers on the CPU.

    Args:
        kind: ``"platt"`` or ``"beta"``.
        beta: Inverse step size, above 0.
        diameter: Sets the first steps, above 0; None takes 1 for ``"platt"``, 2 for ``"beta"``.
        radius: The largest length of ``theta``, above 0.
        eps: What probabilities keep from 0 and 1, above 0 and below one half.

    Raises:
        ValueError: An option is not one of those above, a probability is not from 0 to 1, or a
            target is neither 0 nor 1.
        TypeError: A probability is no number.

    Example:
        >>> from tilework.losses import OnlinePlattScaling
        >>> scaling = OnlinePlattScaling()
        >>> round(scaling.predict(0.8), 6)
        0.8
        >>> for _ in range(100):  # at a probability of 0.8, one outcome in two is 1
        ...     scaling.update(0.8, 1)
        ...     scaling.update(0.8, 0)
        >>> abs(scaling.predict(0.8) - 0.5) < 0.1
        True

    Deviations:
        The released routine starts at 0, which predicts one half, and leaves the projection to a
        convex solver. Here the start is the paper's, and the projection is solved in closed form up
        to one scalar.

    Reference:
        Chirag Gupta, Aaditya Ramdas. Online Platt Scaling with Calibeating. 2023. arXiv:2305.00070.
    """

    kind: str = "platt"
    beta: float = 0.1
    diameter: float | None = None
    radius: float = 100.0
    eps: float = 1e-6
    theta: Tensor = state(lambda self: torch.tensor(self._identity(), dtype=torch.float64))
    matrix: Tensor = state(lambda self: self._first_matrix())

    def __post_init__(self) -> None:
        _checks.one_of(_NAME, "kind", self.kind, KINDS)
        if self.diameter is None:
            self.diameter = 1.0 if self.kind == "platt" else 2.0
        super().__post_init__()

    def _check(self) -> None:
        for argument in ("beta", "diameter", "radius"):
            _checks.positive(_NAME, argument, getattr(self, argument))
        if not 0 < _checks.number(_NAME, "eps", self.eps) < 0.5:
            raise _checks.bad_value(_NAME, "eps", "a number above 0 and below 0.5", self.eps)

    def _identity(self) -> list[float]:
        return [1.0, 0.0] if self.kind == "platt" else [1.0, 1.0, 0.0]

    def _first_matrix(self) -> Tensor:
        diameter = _checks.number(_NAME, "diameter", self.diameter)
        identity = torch.eye(len(self._identity()), dtype=torch.float64)
        return identity / (self.beta * diameter) ** 2

    def predict(self, probability: float) -> float:
        """Return the calibrated probability."""
        return float((self.theta @ self._features("predict", probability)).sigmoid())

    def update(self, probability: float, target: int) -> None:
        """Learn from the outcome, 0 or 1, of an event that had this probability."""
        features = self._features("update", probability)
        if target not in (0, 1):
            raise _checks.bad_value(f"{_NAME}.update", "target", "0 or 1", target)
        gradient = ((self.theta @ features).sigmoid() - int(target)) * features
        self.matrix += torch.outer(gradient, gradient)
        self.theta -= torch.linalg.solve(self.matrix, gradient) / self.beta
        if float(self.theta.norm()) > self.radius:
            self.theta.copy_(_project(self.theta, self.matrix, self.radius))

    def transform(
        self, probabilities: Tensor | Sequence[float], targets: Tensor | Sequence[int]
    ) -> Float64[Tensor, " steps"]:
        """Predict and then update for each probability in turn; return the predictions.

        A prediction depends on the outcomes before it only.
        """
        name = f"{_NAME}.transform"
        values = torch.as_tensor(probabilities, dtype=torch.float64)
        outcomes = torch.as_tensor(targets)
        if values.dim() != 1:
            raise _checks.bad_value(name, "probabilities", "of shape (n)", values)
        _checks.shape(name, "targets", outcomes, values.shape)
        predictions = []
        for probability, target in zip(values.tolist(), outcomes.tolist(), strict=True):
            predictions.append(self.predict(probability))
            self.update(probability, target)
        return torch.tensor(predictions, dtype=torch.float64)

    def _features(self, method: str, probability: float) -> Tensor:
        _checks.fraction(f"{_NAME}.{method}", "probability", probability)
        clipped = min(max(probability, self.eps), 1 - self.eps)
        positive, negative = math.log(clipped), -math.log1p(-clipped)
        features = [positive + negative] if self.kind == "platt" else [positive, negative]
        return torch.tensor([*features, 1.0], dtype=self.theta.dtype, device=self.theta.device)


def _project(theta: Tensor, matrix: Tensor, radius: float) -> Tensor:
    """The point of the ball nearest to ``theta``: (A + mu I)^-1 A theta, mu such that it fits."""
    scales: Tensor
    axes: Tensor
    scales, axes = torch.linalg.eigh(matrix)
    coordinates = axes.T @ theta

    def shrunk(shift: float) -> Tensor:
        return scales / (scales + shift) * coordinates

    low, high = 0.0, float(scales[-1])
    while float(shrunk(high).norm()) > radius:
        low, high = high, 2 * high
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        if float(shrunk(middle).norm()) > radius:
            low = middle
        else:
            high = middle
    return axes @ shrunk(high)
