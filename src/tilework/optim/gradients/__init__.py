"""What is done to gradients between the backward pass and the step, and what they tell."""

from tilework.optim.gradients.adaptive_grad_clip import adaptive_grad_clip_

__all__ = ["adaptive_grad_clip_"]
