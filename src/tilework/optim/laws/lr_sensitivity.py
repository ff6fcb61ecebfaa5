"""How much the final loss depends on the learning rate."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework.catalog import implements

__all__ = ["lr_sensitivity"]

_NAME = "lr_sensitivity"


@implements(
    "Small-scale proxies for large-scale Transformer training instabilities",
    year=2023,
    arxiv="2309.14322",
)
def lr_sensitivity(
    losses: Float[Tensor, "*batch rates"] | Iterable[float],
    *,
    initial_loss: float,
) -> Float[Tensor, "*batch"]:
    r"""Expected loss above the best one, when the learning rate is drawn from a grid.

    With the final ``losses`` :math:`\ell_k` at :math:`L` learning rates that are evenly spaced in
    the logarithm, and :math:`\ell_0` = ``initial_loss``:

    .. math::

        c_k = \min(\ell_k, \ell_0), \qquad \frac{1}{L} \sum_{k=1}^{L} c_k - \min_k c_k

    A run that diverged, with a loss of nan or infinity, counts as :math:`\ell_0`. The paper takes
    three orders of magnitude about the best rate.

    Args:
        losses: Final losses, shape ``(..., L)``, ``L >= 1``, or numbers.
        initial_loss: The loss before training.

    Returns:
        Shape ``(...)``, at least 0, of the dtype of ``losses``; for numbers the default dtype.

    Raises:
        ValueError: ``losses`` has no last dimension, or that is empty; or ``initial_loss`` is not
            finite.
        TypeError: ``losses`` is neither a floating-point tensor nor numbers.

    Example:
        >>> from tilework.optim import lr_sensitivity
        >>> lr_sensitivity([4.0, 2.5, 2.0, float("nan")], initial_loss=10.0)
        tensor(2.6250)

    Deviations:
        The paper states an expectation over log-uniform rates; on a grid, each point counts
        equally.

    Reference:
        Mitchell Wortsman, Peter J. Liu, Lechao Xiao, and others. Small-scale proxies for
        large-scale Transformer training instabilities. 2023. arXiv:2309.14322.
    """
    if not isinstance(losses, Tensor | Iterable):
        raise _checks.bad_type(_NAME, "losses", "a tensor or an iterable of numbers", losses)
    if not isinstance(losses, Tensor):
        numbers = [_checks.number(_NAME, "losses", loss) for loss in losses]
        losses = torch.tensor(numbers, dtype=torch.get_default_dtype())
    _checks.floating(_NAME, "losses", losses)
    if losses.dim() == 0 or losses.shape[-1] == 0:
        raise _checks.bad_value(_NAME, "losses", "of shape (..., L), L >= 1", losses)
    _checks.finite(_NAME, "initial_loss", initial_loss)
    values = losses.to(computation_dtype(losses.dtype))
    values = values.where(values < initial_loss, initial_loss)
    least = values.amin(-1, keepdim=True)
    return (values - least).mean(-1).to(losses.dtype)
