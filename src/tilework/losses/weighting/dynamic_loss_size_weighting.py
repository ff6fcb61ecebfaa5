"""Weights of classes that level out their losses."""

from dataclasses import field

import torch
from torch import Tensor

from tilework import _checks
from tilework._operators import computation_dtype
from tilework._options import StatefulModule, state
from tilework.catalog import implements
from tilework.losses._classes import class_index

__all__ = ["DynamicLossSizeWeighting"]

_NAME = "DynamicLossSizeWeighting"


@implements(
    "Multi-Label Sentiment Analysis on 100 Languages with Dynamic Weighting for Label Imbalance",
    year=2020,
    arxiv="2008.11573",
)
class DynamicLossSizeWeighting(StatefulModule):
    r"""Mean of elementwise losses, in which classes of large losses weigh less.

    The buffer ``class_loss`` holds a running mean :math:`L_c` of each class's losses
    :math:`\ell_{nc}`, at first :math:`1 / C`. In training each call first moves it by
    :math:`\sigma` = ``smoothing``; evaluation leaves it:

    .. math::

        L_c \leftarrow \sigma \, \frac{1}{N} \sum_n \ell_{nc} + (1 - \sigma) L_c, \qquad
        w_c = \frac{1 / (\epsilon + L_c)}{\sum_j 1 / (\epsilon + L_j)}, \qquad
        \frac{1}{N C} \sum_{n, c} w_c \, \ell_{nc}

    so that the contributions :math:`w_c L_c` level out. The weights have no gradient.

    Args:
        num_classes: The number ``C`` of classes.
        smoothing: The part of the newest losses, above 0 and at most 1.
        eps: Added to the running means, above 0.

    Raises:
        ValueError: An option is not one of those above, or the losses are not of shape ``(N, C)``.
        TypeError: The losses are not of a floating dtype.

    Example:
        >>> import torch
        >>> from tilework.losses import DynamicLossSizeWeighting
        >>> weighting = DynamicLossSizeWeighting(2, smoothing=1.0)
        >>> weighting(torch.tensor([[1.0, 3.0], [1.0, 3.0]]))  # (3/4 * 1 + 1/4 * 3) / 2
        tensor(0.7500)
        >>> weighting.class_loss
        tensor([1., 3.])

    Deviations:
        A batch of no samples, or with a class whose mean is not finite, leaves the running means
        alone; its loss shows it, and is nan without samples.

    Reference:
        Selim F. Yilmaz, E. Batuhan Kaynak, Aykut Koç, Hamdi Dibeklioğlu, Suleyman S. Kozat.
        Multi-Label Sentiment Analysis on 100 Languages with Dynamic Weighting for Label Imbalance.
        2020. arXiv:2008.11573.
    """

    num_classes: int = field(kw_only=False)
    smoothing: float = 0.1
    eps: float = 1e-5
    class_loss: Tensor = state(
        lambda self: torch.full(
            (self.num_classes,),
            1 / self.num_classes,
            dtype=computation_dtype(torch.get_default_dtype()),
        )
    )

    def _check(self) -> None:
        _checks.count(_NAME, "num_classes", self.num_classes)
        _checks.positive_fraction(_NAME, "smoothing", self.smoothing)
        _checks.positive(_NAME, "eps", self.eps)

    def forward(self, loss_per_element: Tensor) -> Tensor:
        """Return the weighted mean of losses of shape ``(N, C)``, of their dtype."""
        _checks.floating(_NAME, "loss_per_element", loss_per_element)
        if loss_per_element.dim() != 2 or loss_per_element.shape[1] != self.num_classes:
            accepted = f"of shape (N, {self.num_classes})"
            raise _checks.bad_value(_NAME, "loss_per_element", accepted, loss_per_element)
        losses = loss_per_element.to(computation_dtype(loss_per_element.dtype))
        if self.training and losses.shape[0]:
            newest = losses.detach().mean(0).to(self.class_loss.dtype)
            self._move(newest, class_loss=self.class_loss.lerp(newest, self.smoothing))
        inverse = 1 / (self.eps + self.class_loss.to(losses.dtype))
        weights = inverse / inverse.sum()
        return (weights * losses).mean().to(class_index.result_dtype(loss_per_element))
