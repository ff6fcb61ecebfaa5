"""Learning rates from batch sizes and from the spectrum of the Hessian."""

import math

from tilework import _checks
from tilework.catalog import implements

__all__ = ["batch_hessian_edge", "max_lr_rmt", "polyak_hyperparameters", "scale_lr"]

RULES = ("linear", "sqrt")
_PAPER = implements(
    "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network "
    "Training",
    year=2020,
    arxiv="2006.09092",
)


@_PAPER
def scale_lr(
    base_lr: int | float,
    base_batch_size: int | float,
    batch_size: int | float,
    *,
    rule: str = "linear",
    max_batch_size: int | float | None = None,
) -> float:
    r"""The learning rate for a batch size, from one that is good for another batch size.

    With ``base_lr`` :math:`\eta_0`, ``base_batch_size`` :math:`B_0`, ``batch_size`` :math:`B` and
    ``max_batch_size`` :math:`M`, above which larger batches allow no larger rates:

    .. math::

        r = \frac{\min(B, M)}{\min(B_0, M)}, \qquad \eta_0 r \text{ or } \eta_0 \sqrt r

    for the rules ``"linear"``, of SGD, and ``"sqrt"``, of Adam. The damping of a second-order
    method goes as the learning rate over the batch size.

    Args:
        base_lr: The learning rate at ``base_batch_size``, at least 0.
        base_batch_size: The batch size that it is good for.
        batch_size: The batch size to find a learning rate for.
        rule: ``"linear"`` or ``"sqrt"``.
        max_batch_size: Where the rule ends; nowhere by default.

    Returns:
        The learning rate at ``batch_size``.

    Raises:
        ValueError: A number is out of its range, infinite or nan, or ``rule`` is not one of those
            above.
        TypeError: An argument is not a number.

    Example:
        >>> from tilework.optim import scale_lr
        >>> scale_lr(0.1, 256, 1024)
        0.4
        >>> scale_lr(0.1, 256, 1024, rule="sqrt")
        0.2

    Reference:
        Diego Granziol, Stefan Zohren, Stephen Roberts. Learning Rates as a Function of Batch Size:
        A Random Matrix Theory Approach to Neural Network Training. 2020. arXiv:2006.09092.
    """
    name = "scale_lr"
    _checks.at_least(name, "base_lr", base_lr, 0)
    _checks.positive(name, "base_batch_size", base_batch_size)
    _checks.positive(name, "batch_size", batch_size)
    _checks.one_of(name, "rule", rule, RULES)
    if max_batch_size is None:
        max_batch_size = math.inf
    else:
        _checks.positive(name, "max_batch_size", max_batch_size)
    ratio = min(batch_size, max_batch_size) / min(base_batch_size, max_batch_size)
    return float(base_lr * (ratio if rule == "linear" else math.sqrt(ratio)))


@_PAPER
def batch_hessian_edge(
    eigenvalue: int | float, variance: int | float, num_params: int | float, batch_size: int | float
) -> float:
    r"""The largest eigenvalue of the Hessian of a batch, from that of the whole loss.

    The Hessian of a batch is that of the whole loss, with the largest ``eigenvalue``
    :math:`\lambda`, and noise, whose spectrum ends at :math:`2q`. An eigenvalue above :math:`q`
    stands out of it; one below drowns:

    .. math::

        q = \sqrt{P \sigma^2 / B}, \qquad
        \begin{cases} \lambda + q^2 / \lambda & \lambda > q \\ 2q & \lambda \le q \end{cases}

    with ``num_params`` :math:`P`, ``variance`` :math:`\sigma^2` and ``batch_size`` :math:`B`.

    Args:
        eigenvalue: The largest eigenvalue of the Hessian of the whole loss.
        variance: The variance of an element of the Hessian of one sample, at least 0.
        num_params: The number of parameters.
        batch_size: Samples of a batch.

    Returns:
        The largest eigenvalue of a batch, at least ``eigenvalue``.

    Raises:
        ValueError: A number is out of its range, infinite or nan.
        TypeError: An argument is not a number.

    Example:
        >>> from tilework.optim import batch_hessian_edge
        >>> batch_hessian_edge(10.0, 1e-3, 1_000_000, 100)
        11.0
        >>> batch_hessian_edge(10.0, 1e-3, 1_000_000, 1)
        63.245553203367585

    Reference:
        As :func:`scale_lr`.
    """
    return _edge("batch_hessian_edge", eigenvalue, variance, num_params, batch_size)


@_PAPER
def max_lr_rmt(
    eigenvalue: int | float,
    variance: int | float,
    num_params: int | float,
    batch_size: int | float,
    *,
    momentum: int | float = 0.0,
) -> float:
    r"""The largest learning rate at which SGD with batches is stable.

    .. math::

        \frac{2 (1 + \mathrm{momentum})}{\mathrm{edge}}

    with the edge of :func:`batch_hessian_edge`. It grows with the root of the batch size where the
    noise outweighs the eigenvalue, and tends to that of the whole loss.

    Args:
        eigenvalue: As in :func:`batch_hessian_edge`.
        variance: As there.
        num_params: As there.
        batch_size: As there.
        momentum: The momentum of SGD, at least 0 and below 1.

    Returns:
        The learning rate; infinity where the edge is 0, as nothing curves the loss upwards.

    Raises:
        ValueError: A number is out of its range, infinite or nan.
        TypeError: An argument is not a number.

    Example:
        >>> from tilework.optim import max_lr_rmt
        >>> max_lr_rmt(8.0, 0.0, 1_000_000, 100)
        0.25

    Reference:
        As :func:`scale_lr`.
    """
    name = "max_lr_rmt"
    edge = _edge(name, eigenvalue, variance, num_params, batch_size)
    if not 0 <= _checks.number(name, "momentum", momentum) < 1:
        accepted = "a number of at least 0 and below 1"
        raise _checks.bad_value(name, "momentum", accepted, momentum)
    return float(2 * (1 + momentum) / edge) if edge > 0 else math.inf


@_PAPER
def polyak_hyperparameters(largest: int | float, smallest: int | float) -> tuple[float, float]:
    r"""The learning rate and momentum with which the heavy ball converges fastest on a quadratic.

    With the ``largest`` and ``smallest`` eigenvalues :math:`L \ge l > 0` of the Hessian:

    .. math::

        \Big( \frac{2}{\sqrt L + \sqrt l} \Big)^2, \qquad
        \Big( \frac{\sqrt L - \sqrt l}{\sqrt L + \sqrt l} \Big)^2

    Args:
        largest: The largest eigenvalue.
        smallest: The smallest one, above 0.

    Returns:
        The learning rate and the momentum.

    Raises:
        ValueError: A number is not above 0, infinite or nan, or ``smallest`` is above ``largest``.
        TypeError: An argument is not a number.

    Example:
        >>> from tilework.optim import polyak_hyperparameters
        >>> polyak_hyperparameters(9.0, 1.0)
        (0.25, 0.25)

    Reference:
        As :func:`scale_lr`.
    """
    name = "polyak_hyperparameters"
    _checks.positive(name, "largest", largest)
    _checks.positive(name, "smallest", smallest)
    if smallest > largest:
        raise _checks.bad_value(name, "smallest", f"at most largest, {largest}", smallest)
    high, low = math.sqrt(largest), math.sqrt(smallest)
    return (2 / (high + low)) ** 2, ((high - low) / (high + low)) ** 2


def _edge(
    function: str,
    eigenvalue: int | float,
    variance: int | float,
    num_params: int | float,
    batch_size: int | float,
) -> float:
    _checks.finite(function, "eigenvalue", eigenvalue)
    _checks.at_least(function, "variance", variance, 0)
    _checks.positive(function, "num_params", num_params)
    _checks.positive(function, "batch_size", batch_size)
    noise = math.sqrt(num_params * variance / batch_size)
    if eigenvalue > noise:
        return float(eigenvalue + noise * (noise / eigenvalue))
    return 2 * noise
