"""What is done to gradients between the backward pass and the step, and what they tell."""

from tilework.optim.gradients.adaptive_grad_clip import adaptive_grad_clip_
from tilework.optim.gradients.config_gradient import MomentumConFIG, config_gradient
from tilework.optim.gradients.dual_direction import dual_direction
from tilework.optim.gradients.newton_schulz import newton_schulz

__all__ = [
    "MomentumConFIG",
    "adaptive_grad_clip_",
    "config_gradient",
    "dual_direction",
    "newton_schulz",
]
