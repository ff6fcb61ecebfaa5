"""Laws of training: how rates, batch sizes, decay and loss depend on each other."""

from tilework.optim.laws.lr_sensitivity import lr_sensitivity

__all__ = ["lr_sensitivity"]
