"""The norms whose gains and shifts can be folded into the layers beside them."""

from torch import nn

from tilework.norms import LayerNorm, PartialRMSNorm, RMSNorm

NORMS = (nn.LayerNorm, nn.RMSNorm, LayerNorm, RMSNorm, PartialRMSNorm)
