"""Factors of a layer's input channels folded into the layer before."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tilework import _checks
from tilework.catalog import implements
from tilework.quant._arguments import check_finite
from tilework.quant._norms import NORMS

__all__ = ["apply_scale_"]


@implements(
    "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    year=2023,
    arxiv="2306.00978",
)
@torch.no_grad()
def apply_scale_(previous: nn.Module, layers: Sequence[nn.Linear], scale: Tensor) -> None:
    r"""Multiply the weights of layers along their inputs, and divide what comes before.

    .. math::

        W \leftarrow W \, \mathrm{diag}(t) \quad \text{of each layer}, \qquad
        x \leftarrow \mathrm{diag}(1/t) \, x \quad \text{of what they read}

    with ``scale`` :math:`t`, so that what ``layers`` make of the output of ``previous`` stays the
    same. That output must not be read by anything else. Everything is checked before anything
    changes.

    Args:
        previous: A norm of torch or of :mod:`tilework.norms` with a weight, whose weight and bias
            are divided by :math:`t`, or an ``nn.Linear``, of which it is the rows.
        layers: All layers that read the output of ``previous``.
        scale: Factors above 0, of shape (in,).

    Returns:
        Nothing.

    Raises:
        ValueError: ``scale`` is of another length than a layer's inputs or the output of
            ``previous``, or has an entry that is not above 0 and finite; or ``layers`` is empty or
            names a layer twice.
        TypeError: ``previous`` is of another type or a norm without a weight, one of ``layers`` is
            not an ``nn.Linear``, or ``scale`` not of a real floating dtype.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from tilework.quant import apply_scale_
        >>> norm, layer = nn.LayerNorm(4), nn.Linear(4, 2)
        >>> x = torch.randn(3, 4)
        >>> before = layer(norm(x))
        >>> apply_scale_(norm, [layer], torch.tensor([0.5, 1.0, 2.0, 4.0]))
        >>> torch.allclose(layer(norm(x)), before, atol=1e-6)
        True

    Reference:
        Ji Lin, Jiaming Tang, Haotian Tang, Shang Yang, Wei-Ming Chen, Wei-Chen Wang, Guangxuan
        Xiao, Xingyu Dang, Chuang Gan, Song Han. AWQ: Activation-aware Weight Quantization for LLM
        Compression and Acceleration. 2023. arXiv:2306.00978.
    """
    name = "apply_scale_"
    is_norm = isinstance(previous, NORMS)
    if not is_norm and not isinstance(previous, nn.Linear):
        raise _checks.bad_type(name, "previous", "a norm of torch or tilework, or Linear", previous)
    weight, bias = (previous._parameters.get(key) for key in ("weight", "bias"))
    if weight is None:
        raise TypeError(f"{name}: previous must have a weight, got {previous!r}")
    layers = list(layers)
    if not layers or len({id(layer) for layer in layers}) < len(layers):
        raise _checks.bad_value(name, "layers", "at least one nn.Linear, each once", layers)
    _checks.floating(name, "scale", scale)
    for layer in layers:
        if not isinstance(layer, nn.Linear):
            raise _checks.bad_type(name, "layers", "of nn.Linear", layer)
        _checks.shape(name, "scale", scale, (layer.in_features,))
    if len(weight) != len(scale) or (is_norm and weight.dim() != 1):
        accepted = f"of the outputs of previous, whose weight is of shape {tuple(weight.shape)}"
        raise _checks.bad_value(name, "scale", accepted, scale)
    check_finite(name, "scale", scale)
    if _checks.has_values(scale) and not (scale > 0).all():
        raise ValueError(f"{name}: scale must be above 0 everywhere")
    scale = scale.double()
    for layer in layers:
        layer.weight.copy_(layer.weight.double() * scale)
    offset = float(getattr(previous, "weight_offset", 0.0))
    divisor = scale if is_norm else scale.unsqueeze(1)
    weight.copy_((weight.double() + offset) / divisor - offset)
    if bias is not None:
        bias.copy_(bias.double() / scale)
