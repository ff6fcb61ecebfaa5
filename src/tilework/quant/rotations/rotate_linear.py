"""Rotations folded into the layers beside them, and gains of norms into the layers after."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tilework import _checks
from tilework.catalog import implements
from tilework.quant._norms import NORMS
from tilework.quant.rotations.kurtail_rotation import check_rotation

__all__ = ["fold_norm_", "rotate_linear_"]

_PAPER = implements(
    "RoLoRA: Fine-tuning Rotated Outlier-free LLMs for Effective Weight-Activation Quantization",
    year=2024,
    arxiv="2407.08044",
)


@_PAPER
@torch.no_grad()
def rotate_linear_(linear: nn.Linear, rotation: Tensor, *, side: str = "input") -> None:
    r"""Make a layer read rotated inputs, or write rotated outputs.

    For the ``side`` ``"input"``, where the layer gets :math:`x R`:

    .. math::

        W \leftarrow W R

    and for ``"output"``, where :math:`y R` is wanted of it: :math:`W \leftarrow R^\top W` and
    :math:`b \leftarrow b R`. To rotate a residual stream, fold all norms into the layers after them
    by :func:`fold_norm_`, rotate the outputs of what writes into it, the inputs of what reads it,
    and the rows of the embedding. RMS normalization without a gain commutes with rotations; layer
    normalization does not, because of its mean.

    Args:
        linear: A layer, computed in float64 and stored in its dtype.
        rotation: An orthogonal matrix :math:`R` of the width of that side.
        side: ``"input"`` or ``"output"``.

    Returns:
        Nothing.

    Raises:
        ValueError: ``rotation`` is not orthogonal within 1e-4 or of another width, or ``side`` is
            not one of those above.
        TypeError: ``linear`` is not an ``nn.Linear``, or ``rotation`` not of a real floating dtype.

    Example:
        >>> import torch
        >>> from tilework.quant import random_orthogonal_matrix, rotate_linear_
        >>> layer, x = torch.nn.Linear(4, 2), torch.randn(3, 4)
        >>> rotation, before = random_orthogonal_matrix(4), layer(x)
        >>> rotate_linear_(layer, rotation)
        >>> torch.allclose(layer(x @ rotation), before, atol=1e-5)
        True

    Reference:
        Xijie Huang, Zechun Liu, Shih-Yang Liu, Kwang-Ting Cheng. RoLoRA: Fine-tuning Rotated
        Outlier-free LLMs for Effective Weight-Activation Quantization. 2024. arXiv:2407.08044.
    """
    name = "rotate_linear_"
    if not isinstance(linear, nn.Linear):
        raise _checks.bad_type(name, "linear", "an nn.Linear", linear)
    _checks.one_of(name, "side", side, ("input", "output"))
    width = linear.in_features if side == "input" else linear.out_features
    check_rotation(name, "rotation", rotation, width)
    matrix = rotation.to(linear.weight.device, torch.float64)
    weight = linear.weight.double()
    if side == "input":
        linear.weight.copy_(weight @ matrix)
        return
    linear.weight.copy_(matrix.mT @ weight)
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.double() @ matrix)


@_PAPER
@torch.no_grad()
def fold_norm_(norm: nn.Module, layers: Sequence[nn.Linear]) -> None:
    r"""Move the gain of a norm, and its shift, into the layers that read it.

    With the gain :math:`g` and the shift :math:`\beta`, for each layer

    .. math::

        b \leftarrow b + W \beta, \qquad W \leftarrow W \, \mathrm{diag}(g)

    after which the gain is 1 and the shift 0. All is checked before anything changes.

    Args:
        norm: A norm of torch or of :mod:`tilework.norms`; one without a gain stays as it is.
        layers: All layers that read its output, and nothing else may.

    Returns:
        Nothing.

    Raises:
        ValueError: A layer is of another width, or has no bias where the norm has a shift; or
            ``layers`` is empty or names a layer twice.
        TypeError: ``norm`` is of another type, or one of ``layers`` is not an ``nn.Linear``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tilework.quant import fold_norm_
        >>> norm, layer = nn.RMSNorm(2), nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(norm.weight, 3.0), nn.init.ones_(layer.weight)
        >>> fold_norm_(norm, [layer])
        >>> norm.weight.data, layer.weight.data
        (tensor([1., 1.]), tensor([[3., 3.]]))

    Reference:
        As :func:`rotate_linear_`.
    """
    name = "fold_norm_"
    if not isinstance(norm, NORMS):
        raise _checks.bad_type(name, "norm", "a norm of torch or tilework", norm)
    layers = list(layers)
    if not layers or len({id(layer) for layer in layers}) < len(layers):
        raise _checks.bad_value(name, "layers", "at least one nn.Linear, each once", layers)
    weight, shift = (norm._parameters.get(key) for key in ("weight", "bias"))
    for layer in layers:
        if not isinstance(layer, nn.Linear):
            raise _checks.bad_type(name, "layers", "of nn.Linear", layer)
        if weight is not None and tuple(weight.shape) != (layer.in_features,):
            accepted = f"of layers with {tuple(weight.shape)} inputs"
            raise _checks.bad_value(name, "layers", accepted, layer.in_features)
        if shift is not None and layer.bias is None:
            raise ValueError(f"{name}: layers must have a bias, which takes the shift of the norm")
    if weight is None:
        return
    offset = float(getattr(norm, "weight_offset", 0.0))
    gain = weight.double() + offset
    for layer in layers:
        old = layer.weight.double()
        if shift is not None:
            layer.bias.copy_(layer.bias.double() + old @ shift.double())
        layer.weight.copy_(old * gain)
    weight.fill_(1.0 - offset)
    if shift is not None:
        shift.zero_()
