"""What AdamP and SGDP share: weights whose norm does not matter do not grow."""

import torch
from torch import Tensor

from tilework.optim._optimizer import Numbers, largest, length, where


def project(p: Tensor, g: Tensor, u: Tensor, group: Numbers) -> tuple[Tensor, Tensor | float]:
    """The step without its part along the weights, and the factor of their decay.

    Where the gradient is nearly orthogonal to the weights, channel by channel or else as a whole,
    the weights are taken to be scale-invariant: so is a weight that a normalization follows.
    """
    if p.dim() < 2:
        return u, 1.0
    for_channels, channels = _without_radius(p, g, u, tuple(range(1, p.dim())), group)
    for_layer, layer = _without_radius(p, g, u, tuple(range(p.dim())), group)
    u = torch.where(channels, for_channels, torch.where(layer, for_layer, u))
    return u, where(channels | layer, group["wd_ratio"], 1.0)


def _without_radius(
    p: Tensor, g: Tensor, u: Tensor, dims: tuple[int, ...], group: Numbers
) -> tuple[Tensor, Tensor]:
    """The step without its part along the weights over some dimensions, and whether it is meant."""
    eps = group["eps"]
    size = length(p, dims)
    steepness = length(g, dims)
    product = (g * p).sum(dims, keepdim=True).abs()
    cosine = product / (steepness.clamp(min=eps) * size.clamp(min=eps))
    direction = p / (size + eps)
    radial = (direction * u).sum(dims, keepdim=True)
    elements = p.numel() / size.numel()
    return u - radial * direction, largest(cosine) < group["delta"] / elements**0.5
