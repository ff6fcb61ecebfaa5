"""Losses that bring a quantized model near to the one that it was."""

from tilework.quant.matching.distribution_loss import distribution_loss
from tilework.quant.matching.kl_top_loss import kl_top_loss
from tilework.quant.matching.norm_tweaking import norm_tweaking_, norm_tweaking_lr

__all__ = ["distribution_loss", "kl_top_loss", "norm_tweaking_", "norm_tweaking_lr"]
