"""Products of inputs and weights that are stored as codes."""

from tilework.quant.products.packed_linear import packed_linear

__all__ = ["packed_linear"]
