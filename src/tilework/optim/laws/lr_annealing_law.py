"""Loss curves from schedules of the learning rate."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

from tilework import _checks
from tilework.catalog import implements

__all__ = ["LRAnnealingLaw", "fit_lr_annealing_law", "lr_annealing_areas"]

Numbers = Shaped[Tensor, "..."] | Iterable[int | float]
Observations = tuple[Iterable[Any], Iterable[Any]]  # steps and losses, numbers or tensors
Curve = tuple[Iterable[Any], Iterable[Any], Iterable[Any]]  # learning rates before these
_PAPER = implements("Scaling Law with Learning Rate Annealing", year=2024, arxiv="2408.11029")
_EXPONENTS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5)  # that the fit starts from
_MAX_STEPS = 500  # of the fit, from each


@_PAPER
def lr_annealing_areas(
    lrs: Numbers, *, decay: int | float = 0.999, warmup_steps: int = 0
) -> tuple[Float64[Tensor, " steps"], Float64[Tensor, " steps"]]:
    r"""The area under a schedule, and that of its annealing, up to each step.

    With the learning rates ``lrs`` :math:`\eta_i` of the steps :math:`1 \le i \le S`, ``decay``
    :math:`\lambda` and ``warmup_steps`` :math:`w`, the drops of the rate add up to a momentum,
    which fades:

    .. math::

        S_1(s) = \sum_{i \le s} \eta_i, \qquad S_2(s) = \sum_{i \le s} m_i, \qquad
        m_i = \begin{cases}
            0 & i \le \max(w, 1) \\
            \lambda m_{i-1} + \eta_{i-1} - \eta_i & \text{otherwise}
        \end{cases}

    so that the rise during warm-up does not count.

    Args:
        lrs: The learning rates, floating-point of shape ``(S)``, or numbers: at least 0, the first
            one above 0.
        decay: What is left of the momentum after a step, from 0 to 1.
        warmup_steps: The steps of the warm-up.

    Returns:
        :math:`S_1` and :math:`S_2`, float64 of shape ``(S)`` each.

    Raises:
        ValueError: ``lrs`` is empty or not of one dimension; on the CPU, a learning rate is below
            0, infinite or nan, or the first one is 0; or an option is out of its range. Elsewhere,
            areas are nan from a rate on that is below 0 or not finite.
        TypeError: ``lrs`` is neither a floating-point tensor nor numbers, or an option is of a
            wrong type.

    Example:
        >>> from tilework.optim import lr_annealing_areas
        >>> lr_annealing_areas([4.0, 4.0, 2.0, 1.0], decay=0.5)[1]
        tensor([0., 0., 2., 4.], dtype=torch.float64)

    Reference:
        Howe Tissue, Venus Wang, Lu Wang. Scaling Law with Learning Rate Annealing. 2024.
        arXiv:2408.11029.
    """
    name = "lr_annealing_areas"
    rates = _check_lrs(name, "lrs", lrs)
    _check_options(name, decay, warmup_steps)
    return _areas(rates, decay, warmup_steps)


@_PAPER
@dataclass(frozen=True)
class LRAnnealingLaw:
    r"""The loss at each step of a run, from its learning rates.

    With the areas of :func:`lr_annealing_areas`, ``loss_floor`` :math:`L_0`, ``scale`` :math:`A`,
    ``exponent`` :math:`\alpha` and ``gain`` :math:`C`:

    .. math::

        L(s) = L_0 + A \, S_1(s)^{-\alpha} - C \, S_2(s)

    ``predict`` computes it, and has gradients with respect to the learning rates; ``plot`` draws
    it. :func:`fit_lr_annealing_law` finds the law of a model from losses of a run or two.

    Args:
        loss_floor: The loss of endless training at a constant rate.
        scale: What is above it where :math:`S_1` is 1.
        exponent: The power with which that falls.
        gain: What annealing brings.
        decay: As in :func:`lr_annealing_areas`.

    Raises:
        ValueError: A number is infinite or nan, or ``decay`` is not from 0 to 1; or ``predict`` or
            ``plot`` is given what :func:`lr_annealing_areas` or :func:`fit_lr_annealing_law`
            refuses.
        TypeError: A field is not a number; or as there.
        ImportError: For ``plot``, matplotlib is not installed.

    Example:
        >>> from tilework.optim import LRAnnealingLaw
        >>> law = LRAnnealingLaw(2.0, 1.0, 0.5, 0.25, decay=0.5)
        >>> law.predict([4.0, 5.0, 0.0])
        tensor([2.5000, 2.5833, 1.4583], dtype=torch.float64)

    Reference:
        As :func:`lr_annealing_areas`.
    """

    loss_floor: int | float
    scale: int | float
    exponent: int | float
    gain: int | float
    decay: int | float = 0.999

    def __post_init__(self) -> None:
        for field in ("loss_floor", "scale", "exponent", "gain"):
            _checks.finite("LRAnnealingLaw", field, getattr(self, field))
        _checks.fraction("LRAnnealingLaw", "decay", self.decay)

    def predict(self, lrs: Numbers, *, warmup_steps: int = 0) -> Float64[Tensor, " steps"]:
        """The losses after the steps with these learning rates, float64 of shape ``(S)``."""
        name = "LRAnnealingLaw.predict"
        rates = _check_lrs(name, "lrs", lrs)
        _checks.count(name, "warmup_steps", warmup_steps, 0)
        forward, annealing = _areas(rates, self.decay, warmup_steps)
        return self.loss_floor + self.scale * forward**-self.exponent - self.gain * annealing

    def plot(
        self,
        lrs: Numbers,
        *,
        warmup_steps: int = 0,
        observed: Observations | None = None,
        ax: Any = None,
    ) -> Any:
        """Draw the predicted losses with matplotlib, on ``ax`` or new axes; returns the Axes.

        Those of the warm-up, which the law is not about, are left out. The learning rates stand
        behind, on an axis of their own. Steps and losses that were ``observed`` become points.
        """
        name = "LRAnnealingLaw.plot"
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError(
                f"{name}: needs matplotlib: pip install 'tilework[bench]' ({error})"
            ) from error
        rates = _check_lrs(name, "lrs", _on_cpu(lrs))
        losses = self.predict(rates, warmup_steps=warmup_steps)
        if observed is not None:
            places, seen = _check_observations(name, "observed", observed, len(rates))
        if ax is None:
            ax = pyplot.subplots(layout="constrained")[1]
        steps = range(1, len(rates) + 1)
        behind = ax.twinx()
        behind.plot(steps, rates.numpy(), color="0.75", label="learning rate")
        behind.set(ylabel="learning rate", ylim=(0, None))
        ax.set_zorder(behind.get_zorder() + 1)
        ax.patch.set_visible(False)
        after = slice(warmup_steps, None)
        ax.plot(steps[after], losses[after].numpy(), color="#0b6e4f", label="predicted")
        if observed is not None:
            ax.plot(places.numpy(), seen.numpy(), "k.", label="observed")
            ax.legend(loc="upper right")
        ax.set(xlabel="step", ylabel="loss")
        return ax


@_PAPER
def fit_lr_annealing_law(
    curves: Sequence[Curve],
    *,
    decay: int | float = 0.999,
    warmup_steps: int = 0,
    delta: int | float = 1e-3,
) -> LRAnnealingLaw:
    r"""The law that comes closest to observed losses.

    It minimizes, over the four numbers of :class:`LRAnnealingLaw` and with ``delta``
    :math:`\delta`, the sum over all observations

    .. math::

        \sum_k h(\log L(s_k) - \log \ell_k), \qquad
        h(r) = \begin{cases}
            r^2 / 2 & |r| \le \delta \\
            \delta (|r| - \delta / 2) & \text{otherwise}
        \end{cases}

    by damped Newton steps from several exponents, with what a linear fit finds for them. Of laws
    that would predict a loss of 0 or below, none is taken. Everything is computed in float64 on the
    CPU.

    Args:
        curves: Runs, each a triple of its learning rates, as in :func:`lr_annealing_areas`; the
            steps, counted from 1, at which losses were observed, ints or int64 of shape ``(K)``;
            and these losses, numbers or floating-point of shape ``(K)``.
        decay: As in :func:`lr_annealing_areas`.
        warmup_steps: As there, for all runs.
        delta: From where on a difference of logarithms counts linearly, as that of an outlier.

    Returns:
        The law. Where no rate ever changes its ``gain`` is 0, of which nothing can be known.

    Raises:
        ValueError: As :func:`lr_annealing_areas`; or a step is none of its run, a loss is not above
            0, infinite or nan, there are not as many losses as steps, or fewer than 4 in all.
        TypeError: As there; or a curve is not a triple, or ``steps`` are not ints.

    Example:
        >>> import torch
        >>> from tilework.optim import LRAnnealingLaw, fit_lr_annealing_law
        >>> lrs = torch.linspace(1e-3, 1e-4, 2000)
        >>> steps = torch.arange(100, 2001, 100)
        >>> losses = LRAnnealingLaw(2.5, 0.4, 0.5, 3.0).predict(lrs)[steps - 1]
        >>> law = fit_lr_annealing_law([(lrs, steps, losses)])
        >>> round(law.loss_floor, 4), round(law.exponent, 4)
        (2.5, 0.5)

    Reference:
        As :func:`lr_annealing_areas`.
    """
    name = "fit_lr_annealing_law"
    _check_options(name, decay, warmup_steps)
    _checks.positive(name, "delta", delta)
    parts = []
    for i, curve in enumerate(curves):
        if not isinstance(curve, Sequence) or len(curve) != 3:
            accepted = "a triple of learning rates, steps and losses"
            raise _checks.bad_type(name, f"curves[{i}]", accepted, curve)
        lrs, *observed = curve
        rates = _check_lrs(name, f"lrs of curves[{i}]", _on_cpu(lrs))
        steps, losses = _check_observations(name, f"curves[{i}]", observed, len(rates))
        parts.append((*(area[steps - 1] for area in _areas(rates, decay, warmup_steps)), losses))
    if sum(len(losses) for *_, losses in parts) < 4:
        raise _checks.bad_value(name, "curves", "of 4 observations or more in all", curves)
    forward, annealing, losses = (torch.cat(part) for part in zip(*parts, strict=True))

    # In units in which all numbers are of about the same size.
    typical, unit = forward.log().mean().exp(), losses.log().mean().exp()
    most = annealing.abs().max()
    most = most.where(most > 0, 1)
    problem = _Problem(forward / typical, annealing / most, losses / unit, delta)
    best = min(map(problem.descend, _EXPONENTS), key=problem.objective)
    floor, scale, exponent, gain = best
    return LRAnnealingLaw(
        loss_floor=float(floor * unit),
        scale=float(scale * unit * typical**exponent),
        exponent=float(exponent),
        gain=float(gain * unit / most),
        decay=decay,
    )


@dataclass(frozen=True)
class _Problem:
    """Which law fits; its four numbers are a tensor."""

    forward: Tensor
    annealing: Tensor
    losses: Tensor
    delta: int | float

    def predictions(self, law: Tensor) -> Tensor:
        floor, scale, exponent, gain = law
        result: Tensor = floor + scale * self.forward.pow(-exponent) - gain * self.annealing
        return result

    def objective(self, law: Tensor) -> Tensor:
        """Infinity where a prediction is not above 0 and has no logarithm."""
        sizes = (self.predictions(law) / self.losses).log().abs()
        inside, outside = sizes.square() / 2, self.delta * (sizes - self.delta / 2)
        total = inside.where(sizes <= self.delta, outside).sum()
        return total.where(total.isfinite(), torch.inf)

    def start(self, exponent: float) -> Tensor:
        """The least squares of relative errors, drawn to a constant until all is above 0."""
        columns = [torch.ones_like(self.losses), self.forward.pow(-exponent), -self.annealing]
        design = torch.stack(columns, 1) / self.losses[:, None]
        target = torch.ones_like(self.losses)[:, None]
        floor, scale, gain = torch.linalg.lstsq(design, target, driver="gelsd").solution[:, 0]
        law = torch.stack([floor, scale, torch.full_like(floor, exponent), gain])
        constant = law.new_tensor([1.0, 0.0, exponent, 0.0])
        for _ in range(64):
            if self.objective(law) < torch.inf:
                break
            law = (law + constant) / 2
        return law

    def descend(self, exponent: float) -> Tensor:
        """The best law from an exponent.

        Where errors are outliers, Huber's loss has no curvature. Damping adds the curvature of
        the parabola that touches it from above, with which no step is too long.
        """
        law = self.start(exponent)
        objective, damping = self.objective(law), 1.0
        for _ in range(_MAX_STEPS):
            _, scale, power, _ = law
            predictions = self.predictions(law)
            errors = (predictions / self.losses).log()
            fallen = self.forward.pow(-power)
            slopes = [
                torch.ones_like(fallen),
                fallen,
                -scale * fallen * self.forward.log(),
                -self.annealing,
            ]
            jacobian = torch.stack(slopes, 1) / predictions[:, None]
            weights = (self.delta / errors.abs()).clamp(max=1)
            gradient = jacobian.T @ (weights * errors)
            above = jacobian.T @ (weights[:, None] * jacobian)
            curvature = jacobian.T @ ((weights == 1)[:, None] * jacobian)
            while damping < 1e12:
                damped = curvature + damping * above
                trial = law - torch.linalg.pinv(damped, hermitian=True) @ gradient
                if (found := self.objective(trial)) < objective:
                    break
                damping *= 4
            else:
                break
            settled = objective - found <= 1e-12 * objective
            law, objective, damping = trial, found, damping / 4
            if settled:
                break
        return law


def _areas(lrs: Tensor, decay: int | float, warmup_steps: int) -> tuple[Tensor, Tensor]:
    places = torch.arange(lrs.shape[0], device=lrs.device)
    drops = -lrs.diff(prepend=lrs[:1])  # 0 at first
    momentum = drops.where(places >= warmup_steps, 0)
    if decay == 1:
        momentum = momentum.cumsum(0)
    else:
        # By doubling: each element is the faded sum of those up to ``reach`` - 1 steps before.
        reach, left = 1, float(decay)
        while left > 0:
            momentum = momentum + left * momentum.roll(reach, 0).where(places >= reach, 0)
            reach, left = 2 * reach, left**2
    return lrs.cumsum(0), momentum.cumsum(0)


def _check_options(function: str, decay: int | float, warmup_steps: int) -> None:
    _checks.fraction(function, "decay", decay)
    _checks.count(function, "warmup_steps", warmup_steps, 0)


def _on_cpu(values: object) -> object:
    return values.detach().cpu() if isinstance(values, Tensor) else values


def _check_series(function: str, argument: str, values: object) -> Tensor:
    """Numbers as a float64 tensor of one dimension."""
    if isinstance(values, Tensor):
        _checks.floating(function, argument, values)
    elif isinstance(values, Iterable):
        numbers = [_checks.number(function, argument, value) for value in values]
        values = torch.tensor(numbers, dtype=torch.float64)
    else:
        raise _checks.bad_type(function, argument, "a tensor or an iterable of numbers", values)
    if values.dim() != 1 or values.shape[0] == 0:
        raise _checks.bad_value(function, argument, "of shape (S,), S >= 1", values)
    return values.double()


def _check_steps(function: str, argument: str, steps: object, count: int) -> Tensor:
    """Steps of a run of so many, as int64."""
    if isinstance(steps, Iterable) and not isinstance(steps, Tensor):
        numbers = [_checks.integer(function, argument, step) for step in steps]
        steps = torch.tensor(numbers, dtype=torch.int64)
    if not isinstance(steps, Tensor) or steps.dtype != torch.int64:
        raise _checks.bad_type(function, argument, "ints or int64", steps)
    outside = steps[(steps < 1) | (steps > count)]
    if outside.numel():
        accepted = f"from 1 to {count}"
        raise _checks.bad_value(function, argument, accepted, outside[0].item())
    return steps


def _check_lrs(function: str, argument: str, values: object) -> Tensor:
    lrs = _check_series(function, argument, values)
    right = (lrs >= 0) & (lrs < torch.inf)
    if _checks.holds_values(lrs):
        if not right.all():
            accepted = "finite and at least 0 everywhere"
            raise _checks.bad_value(function, argument, accepted, lrs[~right][0].item())
        if lrs[0] == 0:
            raise _checks.bad_value(function, argument, "above 0 at the first step", 0.0)
    return lrs.where(right, torch.nan)


def _check_observations(
    function: str, argument: str, observed: object, count: int
) -> tuple[Tensor, Tensor]:
    if not isinstance(observed, Sequence) or len(observed) != 2:
        raise _checks.bad_type(function, argument, "a pair of steps and losses", observed)
    steps = _check_steps(function, f"steps of {argument}", _on_cpu(observed[0]), count)
    losses = _check_series(function, f"losses of {argument}", _on_cpu(observed[1]))
    _checks.shape(function, f"steps of {argument}", steps, losses.shape)
    wrong = losses[~((losses > 0) & (losses < torch.inf))]
    if wrong.numel():
        accepted = "finite and above 0 everywhere"
        raise _checks.bad_value(function, f"losses of {argument}", accepted, wrong[0].item())
    return steps, losses
