"""Sample quantiles, their targets and levels."""

import torch

from losses.samples import Arguments


def quantiles(*shape: int, levels: int = 5) -> Arguments:
    """Unordered quantiles of shape (*shape, levels) in float64."""
    return {
        "input": torch.randn(*shape, levels, dtype=torch.float64),
        "target": torch.randn(shape, dtype=torch.float64),
        "quantile_levels": (torch.arange(levels).double() + torch.rand(levels)) / levels * 0.9
        + 0.05,
    }
