"""What is done to gradients between the backward pass and the step, and what they tell."""

from tilework.optim.gradients.adaptive_grad_clip import adaptive_grad_clip_
from tilework.optim.gradients.dual_direction import dual_direction
from tilework.optim.gradients.newton_schulz import newton_schulz
from tilework.optim.gradients.tangent_project import renorm_, tangent_project_

__all__ = ["adaptive_grad_clip_", "dual_direction", "newton_schulz", "renorm_", "tangent_project_"]
