"""Weight decay that holds for runs of any length."""

import math

from tilework import _checks
from tilework.catalog import implements

__all__ = ["normalized_weight_decay"]

_NAME = "normalized_weight_decay"


@implements("Decoupled Weight Decay Regularization", year=2017, arxiv="1711.05101")
def normalized_weight_decay(
    weight_decay: int | float,
    *,
    batch_size: int | float,
    num_samples: int | float,
    epochs: int | float,
) -> float:
    r"""The decoupled weight decay of a run, from one that does not depend on its length.

    With the normalized ``weight_decay`` :math:`\lambda_n`, ``batch_size`` :math:`b`,
    ``num_samples`` :math:`B` and ``epochs`` :math:`T`:

    .. math::

        \lambda_n \sqrt{\frac{b}{B T}}

    Args:
        weight_decay: The normalized weight decay, at least 0.
        batch_size: Samples of a step.
        num_samples: Samples of an epoch.
        epochs: The length of the run in epochs; under warm restarts, that of the current period.

    Returns:
        The weight decay.

    Raises:
        ValueError: ``weight_decay`` is below 0, another argument is not above 0, or one is
            infinite or nan.
        TypeError: An argument is not a number.

    Example:
        >>> from tilework.optim import normalized_weight_decay
        >>> normalized_weight_decay(0.05, batch_size=100, num_samples=10_000, epochs=25)
        0.001

    Reference:
        Ilya Loshchilov, Frank Hutter. Decoupled Weight Decay Regularization. 2017.
        arXiv:1711.05101.
    """
    _checks.at_least(_NAME, "weight_decay", weight_decay, 0)
    _checks.positive(_NAME, "batch_size", batch_size)
    _checks.positive(_NAME, "num_samples", num_samples)
    _checks.positive(_NAME, "epochs", epochs)
    return float(weight_decay * math.sqrt(batch_size / (num_samples * epochs)))
