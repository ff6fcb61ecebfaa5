"""What AdamP and SGDP share: weights whose norm does not matter do not grow."""

import torch
from torch import Tensor

from tilework.optim._optimizer import Numbers, dot, largest, where


def project(p: Tensor, g: Tensor, u: Tensor, group: Numbers) -> tuple[Tensor, Tensor | float]:
    """The step without its part along the weights, and the factor of their decay.

    Where the gradient is nearly orthogonal to the weights, channel by channel or else as a whole,
    the weights are taken to be scale-invariant: so is a weight that a normalization follows.
    """
    if p.dim() < 2:
        return u, 1.0
    dims = tuple(range(1, p.dim()))
    products = [dot(*pair, dims) for pair in ((p, p), (g, g), (g, p), (u, p))]
    channels, of_channels = _radial(products, p.numel() // len(p), group)
    layer, of_layer = _radial([each.sum() for each in products], p.numel(), group)
    radial = torch.where(channels, of_channels, torch.where(layer, of_layer, 0.0))
    return u - radial * p, where(channels | layer, group["wd_ratio"], 1.0)


def _radial(products: list[Tensor], elements: int, group: Numbers) -> tuple[Tensor, Tensor]:
    """Whether the step is to lose its part along the weights, and what that is in their units."""
    pp, gg, gp, up = products
    eps = group["eps"]
    size = pp.sqrt()
    cosine = gp.abs() / (gg.sqrt().clamp(min=eps) * size.clamp(min=eps))
    return largest(cosine) < group["delta"] / elements**0.5, up / (size + eps) ** 2
