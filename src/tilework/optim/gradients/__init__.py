"""What is done to gradients between the backward pass and the step, and what they tell."""

from tilework.optim.gradients.adaptive_grad_clip import adaptive_grad_clip_
from tilework.optim.gradients.config_gradient import MomentumConFIG, config_gradient
from tilework.optim.gradients.dual_direction import dual_direction
from tilework.optim.gradients.newton_schulz import newton_schulz
from tilework.optim.gradients.norm_test import (
    AdaptiveBatchSize,
    BatchSizeTest,
    inner_product_test,
    microbatch_norm_test,
    norm_test,
)
from tilework.optim.gradients.tangent_project import renorm_, tangent_project_
from tilework.optim.gradients.wta_crs import WTACRSLinear, wta_crs_matmul, wta_crs_sample

__all__ = [
    "AdaptiveBatchSize",
    "BatchSizeTest",
    "MomentumConFIG",
    "WTACRSLinear",
    "adaptive_grad_clip_",
    "config_gradient",
    "dual_direction",
    "inner_product_test",
    "microbatch_norm_test",
    "newton_schulz",
    "norm_test",
    "renorm_",
    "tangent_project_",
    "wta_crs_matmul",
    "wta_crs_sample",
]
