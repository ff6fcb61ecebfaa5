"""What is done to gradients between the backward pass and the step, and what they tell."""

__all__: list[str] = []
