"""The penalty on rows of weights whose norm is not 1."""

from collections.abc import Iterable
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tilework import _checks
from tilework._operators import computation_dtype
from tilework._options import OptionsModule
from tilework.catalog import implements
from tilework.losses._classes import class_index

__all__ = ["NormLoss", "norm_loss"]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NAME = "norm_loss"
_PAPER = implements(
    "Norm Loss: An efficient yet effective regularization method for deep neural networks",
    year=2021,
    arxiv="2103.06583",
)


@_PAPER
def norm_loss(
    weight: Float[Tensor, "rows ..."] | Iterable[Float[Tensor, "..."]],
    *,
    coefficient: float = 0.01,
) -> Float[Tensor, ""]:
    r"""Penalty that pulls each row of a weight to norm 1, in place of weight decay.

    With the rows :math:`w_c` of each ``weight``, its slices along the first dimension, and
    :math:`\lambda` = ``coefficient``:

    .. math::

        \lambda \sum_c (1 - \lVert w_c \rVert_2)^2

    summed over the weights. The gradient of a row of zeros is 0. Weights may be DTensors, as in a
    model under FSDP2: each process gets the whole sum.

    Args:
        weight: A tensor of at least 2 dimensions, or an iterable of at least one such.
        coefficient: What the sum is multiplied by, at least 0.

    Returns:
        A scalar of the dtype of ``weight``, of several the one that they promote to; for half
        precision under autocast float32.

    Raises:
        ValueError: A tensor has fewer than 2 dimensions, there is none, or the coefficient is
            negative.
        TypeError: A tensor is not of a floating dtype.

    Example:
        >>> import torch
        >>> from tilework.losses import norm_loss
        >>> norm_loss(torch.tensor([[0.6, 0.8], [3.0, 4.0]]), coefficient=1.0)  # 0 + (1 - 5)**2
        tensor(16.)

    Deviations:
        The default of ``coefficient`` is that of later uses; it is tuned as a weight decay is.

    Reference:
        Theodoros Georgiou, Sebastian Schmitt, Thomas Bäck, Wei Chen, Michael Lew. Norm Loss: An
        efficient yet effective regularization method for deep neural networks. 2021.
        arXiv:2103.06583.
    """
    _checks.at_least(_NAME, "coefficient", coefficient, 0)
    accepted = "a floating-point tensor or a non-empty iterable of such"
    if not isinstance(weight, Iterable):
        raise _checks.bad_type(_NAME, "weight", accepted, weight)
    weights = {"weight": weight} if isinstance(weight, Tensor) else _named(weight)
    if not weights:
        raise _checks.bad_value(_NAME, "weight", accepted, weight)
    for argument, tensor in weights.items():
        _checks.floating(_NAME, argument, tensor)
        if tensor.dim() < 2:
            raise _checks.bad_value(_NAME, argument, "of at least 2 dimensions", tensor)
    _checks.same_device(_NAME, **weights)
    dtypes = {class_index.result_dtype(tensor) for tensor in weights.values()}
    total = torch.stack([_penalty(tensor) for tensor in weights.values()]).sum()
    return (coefficient * total).to(reduce(torch.promote_types, dtypes))


@_PAPER
class NormLoss(OptionsModule):
    """:func:`norm_loss` of a model's linear and convolutional layers.

    It counts the parameter ``weight`` of each ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` and
    ``nn.Conv3d``, one that layers share only once.

    Example:
        >>> import torch
        >>> from tilework.losses import NormLoss
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> _ = torch.nn.init.zeros_(model[0].weight)
        >>> NormLoss(coefficient=1.0)(model).detach()
        tensor(4.)
    """

    coefficient: float = 0.01

    def _check(self) -> None:
        _checks.at_least(_NAME, "coefficient", self.coefficient, 0)

    def forward(self, model: nn.Module) -> Tensor:
        """Return the penalty on a model's weights, a scalar."""
        if not isinstance(model, nn.Module):
            raise _checks.bad_type("NormLoss", "model", "an nn.Module", model)
        layers = [layer for layer in model.modules() if isinstance(layer, LAYERS)]
        weights = list({id(layer.weight): layer.weight for layer in layers}.values())
        if not weights:
            names = ", ".join(layer.__name__ for layer in LAYERS)
            raise ValueError(f"NormLoss: model must have a layer of {names}, got {model!r}")
        return norm_loss(weights, **self.options())


def _named(weights: Iterable[Tensor]) -> dict[str, Tensor]:
    return {f"weight[{index}]": tensor for index, tensor in enumerate(weights)}


def _penalty(weight: Tensor) -> Tensor:
    rows = weight.to(computation_dtype(weight.dtype)).flatten(1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    penalty = (1 - norms).square().sum()
    # Of a DTensor, which is a part of the weight's rows or columns: the whole sum, on each process.
    return penalty.full_tensor() if hasattr(penalty, "full_tensor") else penalty
